"""The fenced blocks and the inline code of the pages, by kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^(?P<indent> *)```(?P<kind>.*)\n(?P<text>(?s:.*?))^(?P=indent)```$", re.M)


class Block(NamedTuple):
    """A fenced block; `line` is that of its fence."""

    page: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*kinds: str) -> list[Block]:
    """The blocks of all pages; of these kinds, where any is named."""
    return [block for page in PAGES for block in _of(page) if not kinds or block.kind in kinds]


def _of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in BLOCK.finditer(text):
        lines = found["text"].splitlines(keepends=True)
        yield Block(
            page,
            text[: found.start()].count("\n") + 1,
            found["kind"],
            "".join(line.removeprefix(found["indent"]) for line in lines),
        )


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return BLOCK.sub("", page.read_text())
