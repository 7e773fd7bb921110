"""`peft-kasa export`: an adapter as a plain LoRA."""

from __future__ import annotations

from argparse import Namespace

from peft_kasa_cli.output import Output, table

from ..sharing.export import export_lora
from .folders import check_free, size, whole_folder
from .models import adapter_config, base_of, load_adapter

SHOWN = 5  # modules that lose most


def run(args: Namespace, out: Output) -> None:
    """Writes the LoRA and says what it has lost, if it was cut."""
    base = base_of(adapter_config(args.adapter), args.base, args.adapter)
    check_free(args.out, args.overwrite, args.adapter, base)
    out.note(f"loading {args.adapter} and its base")
    model = load_adapter(args.adapter, args.base)
    with whole_folder(args.out, args.overwrite) as folder:
        report = export_lora(model, folder, rank=args.rank, uniform=not args.per_module)
    data = {
        "path": args.out,
        "bytes": size(args.out),
        "modules": len(report.errors),
        "rank": report.rank,
        "max_lora_rank": report.max_lora_rank,
        "errors": report.errors,
    }
    worst = sorted(report.errors.items(), key=lambda item: -item[1])[:SHOWN]
    lost = [table(["module", "relative error"], worst, "What the cut loses most of")] if args.rank else []
    out.result(data, f"{args.out}: {report}", *lost)
