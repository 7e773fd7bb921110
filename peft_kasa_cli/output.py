"""What a command shows: tables, or JSON and nothing else, on standard output; everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from types import NoneType
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

WIDE = 200  # columns where no terminal says how many there are


class Output:
    """Where a command's result goes.

    Args:
        stream: for results.
        as_json: whether they are JSON. Otherwise tables and lines, with colours on terminals unless NO_COLOR is set.
    """

    def __init__(self, stream: TextIO, as_json: bool) -> None:
        self.stream, self.as_json = stream, as_json
        self._shown = Console(file=stream, width=None if stream.isatty() else WIDE, highlight=False, emoji=False)
        self._aside = Console(file=sys.stderr, highlight=False, emoji=False)

    def result(self, data: Any, *shown: Table | str) -> None:
        """The result: `data` as JSON, or what is shown of it."""
        if self.as_json:
            self.stream.write(json.dumps(data, indent=2, allow_nan=False) + "\n")
        else:
            for part in shown:
                plain = isinstance(part, str)  # a path in it may have brackets
                self._shown.print(part, soft_wrap=plain, markup=not plain)
        self.stream.flush()

    def line(self, what: str) -> None:
        """Says something after the result, beside tables alone."""
        if not self.as_json:
            self._shown.print(escape(what), soft_wrap=True)
            self.stream.flush()

    def note(self, what: str) -> None:
        """Says on a terminal what is being done: libraries draw their own bars below."""
        if self._aside.is_terminal:
            self._aside.print(f"{escape(what)} ...", style="dim", soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> Table:
    """A table of texts, which may have a style, and numbers, to the right. No header where no column has a name."""
    rows = [list(row) for row in rows]
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_header=any(columns), header_style="bold")
    for place, name in enumerate(columns):
        numbers = rows and all(type(row[place]) in (int, float, NoneType) for row in rows)
        if numbers:  # a narrow terminal folds texts, not these
            made.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
        else:
            made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else escape(text(cell)) for cell in row))
    return made


def text(value: Any) -> str:
    """A cell: numbers short, truths as words, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def results_only() -> Iterator[TextIO]:
    """Standard output, for results alone: what libraries print there, from C too, goes to standard error meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with open(os.dup(kept), "w", encoding="utf-8") as stream, redirect_stdout(sys.stderr):
            yield stream
    finally:
        os.dup2(kept, 1)
        os.close(kept)
