"""Writing a folder whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import replacing


def check_free(out: str, overwrite: bool, *sources: str | None) -> None:
    """Raises ValueError, before any work, where a folder may not be written. Sources are never overwritten."""
    path = Path(out)
    if any(source and Path(source).exists() and path.exists() and path.samefile(source) for source in sources):
        raise ValueError(f"{out} is what would be read. Name another folder to write.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{out} is a file. Name a folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"{out} is there already, and not empty. Name another folder, or pass --overwrite.")


@contextmanager
def whole_folder(out: str, overwrite: bool) -> Iterator[str]:
    """Yields an empty folder, which takes the place of `out` at the end. An exception leaves what stood there."""
    check_free(out, overwrite)
    path = os.path.abspath(out)
    with replacing(path) as beside:
        made = os.path.join(beside, os.path.basename(path))
        os.mkdir(made)
        yield made
        if os.path.isdir(path):
            os.replace(path, os.path.join(beside, ".replaced"))


def size(folder: str) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
