"""What was measured, a JSON line a run: an interruption loses the run that was under way and no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    """The rows of a file, which grows by one line at a time.

    The first line holds the settings; a file made with others is refused, since its rows would not compare. It also
    holds what is known `about` the machine and the code of the first call, which may change.
    """

    def __init__(self, file: Path, settings: Row, about: Row) -> None:
        self.file = file
        self.rows: list[Row] = []
        if file.is_file():
            self.settings, *self.rows = read(file)
            differing = [key for key in settings if self.settings.get(key) != settings[key]]
            if differing:
                was, now = ({key: of.get(key) for key in differing} for of in (self.settings, settings))
                sys.exit(f"{file} was made with {was}, not {now}: give another --output, or remove it.")
        else:
            self.settings = settings | about
            self._write(self.settings)

    def add(self, row: Row) -> None:
        """Keeps a row, on disk before it returns."""
        self.rows.append(row)
        self._write(row)

    def of(self, kind: str, method: str) -> list[Row]:
        """The rows of one kind ("rate" or "run") and method."""
        return [row for row in self.rows if (row["kind"], row["method"]) == (kind, method)]

    def _write(self, row: Row) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as out:
            out.write(json.dumps(row) + "\n")


def read(file: Path) -> list[Row]:
    """The lines that are whole. The last one is dropped from the file too, where it was cut short."""
    lines = file.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        file.write_text("".join(lines := lines[:-1]))
    return [json.loads(line) for line in lines]
