"""`peft-kasa spectrum`: the singular values of a model's weights."""

from __future__ import annotations

from argparse import Namespace

from peft_kasa_cli.output import Output, table

from ..report import spectrum
from .models import load_model
from .reports import check_pages, show

SHARES = {"rank_50": "rank for 50%", "rank_90": "for 90%"}


def run(args: Namespace, out: Output) -> None:
    """Shows a row a weight at the first of the ranks; the JSON has all of them, and all singular values."""
    check_pages(args)
    out.note(f"loading {args.model}")
    model = load_model(args.model, args.dtype)
    targets = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
    report = spectrum(model, ranks=args.ranks, target_modules=targets)
    r = report.marked
    columns = {
        "module": "module",
        "rows": "m",
        "columns": "n",
        "largest": "largest",
        "effective_rank": "effective rank",
    }
    columns |= {f"energy_r{r}": f"energy at {r}", **SHARES, f"budget_r{r}": f"budget at {r}"}
    columns |= {f"cut_value_r{r}": "KaSA cuts below", f"cut_energy_r{r}": "cut's energy"}
    rows = [[row[key] for key in columns] for row in report.rows()]
    show(report, args, out, table(list(columns.values()), rows))
