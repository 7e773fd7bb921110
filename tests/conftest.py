from __future__ import annotations

from collections.abc import Iterator

import bases
import forked
import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tiny model."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    bases.make(folder)
    return folder


@pytest.fixture(scope="session")
def forks() -> Iterator[forked.Server]:
    """Where processes of `peft-kasa` come from."""
    with forked.server() as server:
        yield server
