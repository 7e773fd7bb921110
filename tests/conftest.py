from __future__ import annotations

import bases
import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tiny model."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    bases.make(folder)
    return folder
