"""Writing a file, or a folder, whole or not at all, and whether one can be."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields an empty folder beside `path`. What is written there under the same name, a file or a folder, takes the
    place of `path`.

    An exception leaves what stood at `path` before, and so does the end of the process while a file is written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with temporary_folder(folder, f".{name}.") as fresh:
        yield fresh
        made = os.path.join(fresh, name)
        if os.path.isdir(made) and os.path.isdir(path):
            _replace_folder(made, path, os.path.join(fresh, ".replaced"))
        else:
            os.replace(made, path)


def check_writable(path: str, inside: bool = False) -> None:
    """Makes sure, before any work, that something can be written beside a file or folder.

    Args:
        path: of it.
        inside: whether it is a folder, there or not yet, that is written into.

    Raises:
        ValueError: it cannot.
    """
    place = Path(os.path.realpath(path))
    nearest = next(folder for folder in (*([place] if inside else []), *place.parents) if folder.exists())
    try:
        with temporary_folder(str(nearest), ".peft-kasa."):
            return
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {nearest}: {error.strerror}. Name a place that can be.") from error


@contextmanager
def temporary_folder(parent: str, prefix: str) -> Iterator[str]:
    """Yields an empty folder in `parent`, which is removed at the end, even where Ctrl-C comes while it is removed."""
    fresh = tempfile.mkdtemp(dir=parent, prefix=prefix)
    try:
        yield fresh
    finally:
        try:
            shutil.rmtree(fresh, ignore_errors=True)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise


def _replace_folder(made: str, path: str | os.PathLike[str], aside: str) -> None:
    """Two renames, since none replaces a folder that is not empty. What was moved aside comes back if they fail."""
    try:
        os.replace(path, aside)
        os.replace(made, path)
    except BaseException:  # Ctrl-C between them, too
        if os.path.isdir(aside) and not os.path.exists(path):
            os.replace(aside, path)
        raise
