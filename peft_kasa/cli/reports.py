"""The pages and pictures of the commands that have a report."""

from __future__ import annotations

from argparse import Namespace

from peft_kasa_cli.output import Output

from ..report.report import Report


def draw(report: Report, args: Namespace, out: Output) -> None:
    """Writes the files that were asked for."""
    if args.html:
        out.note(f"writing {args.html}")
        report.to_html(args.html)
    if args.png:
        out.note(f"writing {args.png}")
        report.to_png(args.png)


def written(args: Namespace) -> list[str]:
    """A line for each of them."""
    return [f"written: {path}" for path in (args.html, args.png) if path]
