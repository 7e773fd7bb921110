"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields an empty folder beside `path`. The file of the same name that is written there takes the place of `path`.

    An exception, or the end of the process, leaves what stood at `path` before.
    """
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as fresh:
        yield fresh
        os.replace(os.path.join(fresh, name), path)
