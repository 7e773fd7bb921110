"""The pages and pictures of the commands that have a report."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from peft_kasa_cli.output import Output

from ..files import check_writable
from ..report.report import Report, drawing

DRAWN_BY = {"html": "page", "png": "picture"}


def check_pages(args: Namespace) -> None:
    """Makes sure, before any work, that the files that were asked for can be drawn and written.

    Raises:
        ValueError: a name of another kind, which may be that of something else, or a place that cannot be written.
        ImportError: Altair or vl-convert is missing.
    """
    for kind, path in _pages(args).items():
        if Path(path).suffix.lower() != f".{kind}" or Path(path).is_dir():
            raise ValueError(f"--{kind} has to be the name of a .{kind} file. Found {path}.")
        check_writable(path)
        drawing(DRAWN_BY[kind])


def show(report: Report, args: Namespace, out: Output, *tables: Any) -> None:
    """The result, and then the files that were asked for: what was computed is shown even if they fail."""
    pages = _pages(args)
    out.result(report.to_dict() | ({"pages": pages} if pages else {}), *tables, report.summary())
    for kind, path in pages.items():
        out.note(f"writing {path}")
        (report.to_html if kind == "html" else report.to_png)(path)
        out.line(f"written: {path}")


def _pages(args: Namespace) -> dict[str, str]:
    return {kind: getattr(args, kind) for kind in DRAWN_BY if getattr(args, kind)}
