"""From a file of results to the page of the docs: table, rates, plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .adapters import CONTENDERS
from .classifier import REFERENCES
from .plot import draw
from .report import Measure, about, lines, place, table, tried
from .results import read

PAGE = "reproduction.md"


def publish(folder: Path, name: str, measures: Sequence[Measure]) -> None:
    """Prints what `name`.jsonl says, draws it, and puts it into the folder's reproduction.md if there is one."""
    settings, *rows = read(folder / f"{name}.jsonl")
    titles = {key: method.at(settings["rank"]).title for key, method in CONTENDERS.items()} | REFERENCES
    found = lines(rows, titles, measures[0])
    if not found:
        print(f"{name}: no seed has run yet")
        return
    draw(found, measures[0], [key for key, method in CONTENDERS.items() if method.ours], folder / f"{name}.svg")
    parts = [about(settings), table(found, measures)]
    if any(row["kind"] == "rate" for row in rows):
        parts += ["Validation loss at each rate that was tried:", tried(rows, titles)]
    text = "\n\n".join([*parts, f"![The same figures, drawn]({name}.svg)"])
    print(text)
    if (folder / PAGE).is_file():
        place(folder / PAGE, name, text)
