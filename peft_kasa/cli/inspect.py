"""`peft-kasa inspect`: what a saved adapter is, and what it does to the weights."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from rich.table import Table

from peft_kasa_cli.output import Output, table

from ..report import inspect
from .models import adapter_config, adapter_folder, load_model
from .reports import check_pages, show

UPDATE = {"module": "module", "rank": "r", "trained": "trained", "update_rank": "rank", "norm": "norm"}
UPDATE |= {"spectral_norm": "largest", "effective_rank": "effective rank"}
BASE = {
    "module": "module",
    "relative_norm": "norm, of W's",
    "overlap_top_left": "top, left",
    "overlap_top_right": "right",
}
BASE |= {"overlap_bottom_left": "bottom, left", "overlap_bottom_right": "right", "intruders_0.5": "intruders"}
OTHER = {
    "module": "module",
    "cosine": "cosine",
    "relative_distance": "distance",
    "overlap_left": "left",
    "overlap_right": "right",
}


def run(args: Namespace, out: Output) -> None:
    """Shows a row a module; with a base beside its weights, with another adapter beside that."""
    check_pages(args)
    config = adapter_config(args.adapter)
    if args.against is not None:
        adapter_config(args.against)
    base = None
    if args.base is not None:
        out.note(f"loading {args.base}")
        base = load_model(args.base, task=config.task_type)
    other = None if args.against is None else adapter_folder(args.against)
    report = inspect(adapter_folder(args.adapter), base, other)
    rows = report.rows()
    tables = [_part("Updates", UPDATE, rows)]
    if base is not None:
        tables.append(_part("Beside the base's weights: overlaps with their top and bottom subspaces", BASE, rows))
    if other is not None:
        tables.append(_part(f"Beside the updates of {args.against}: overlaps of their subspaces", OTHER, rows))
    show(report, args, out, *tables)


def _part(title: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> Table:
    return table(list(columns.values()), [[row[key] for key in columns] for row in rows], title)
