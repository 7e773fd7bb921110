"""Stacked experts in two processes: trained as in one, saved, and loaded with the frames shared between them."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import torchrun


@pytest.mark.real
def test_in_two_processes_as_in_one(tmp_path: Path) -> None:
    assert torchrun("experts_worker.py", str(tmp_path)).count("well") == 2
