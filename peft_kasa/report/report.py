"""What all reports can do: rows, a dictionary, a few lines of text, a page and a picture."""

from __future__ import annotations

import importlib
import math
import os
from abc import ABC, abstractmethod
from typing import Any

INSTALL = "Charts need Altair and vl-convert: pip install 'peft_kasa[report]'. rows(), to_dict() and summary() do not."


class Report(ABC):
    """The part that `SpectrumReport` and `AdapterReport` share."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a module, all with the same keys, in the model's order. None: not known, or not finite."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""

    @abstractmethod
    def summary(self) -> str:
        """A few lines of text."""

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page with charts and a table: one file, which loads nothing and follows the reader's light or dark
        theme. It takes the place of `path` whole or not at all.

        Raises:
            ImportError: Altair or vl-convert is missing.
        """
        drawing("page").write(self, path)

    def to_png(self, path: str | os.PathLike[str], scale: float = 2.0) -> None:
        """Writes the charts as one light picture, `scale` pixels a point. Likewise.

        Raises:
            ImportError: Altair or vl-convert is missing.
        """
        drawing("picture").write(self, path, scale)


def drawing(name: str) -> Any:
    """The module "page" or "picture", imported when it is asked for: numbers alone need no plotting library.

    Raises:
        ImportError: Altair or vl-convert is missing.
    """
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("altair", "vl_convert"):
            raise ImportError(INSTALL) from error
        raise


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [plain(held) for held in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def listed(names: list[str], most: int = 8) -> str:
    """Names in a sentence, the rest counted."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
