"""`peft-kasa convert`: a LoRA as an adapter of the family."""

from __future__ import annotations

from argparse import Namespace

from peft_kasa_cli.output import Output

from ..adapter.starting import layers_of
from ..sharing.from_lora import from_lora
from .folders import check_free, size, whole_folder
from .models import adapter_config, base_of, load_base


def run(args: Namespace, out: Output) -> None:
    """Writes the adapter, and says what it is now."""
    lora = adapter_config(args.adapter)
    check_free(args.out, args.overwrite, args.adapter, base_of(lora, args.base, args.adapter), args.initial)
    if args.initial is not None:
        adapter_config(args.initial)
    out.note("loading the base")
    base = load_base(lora, args.base, args.adapter)
    out.note(f"converting {args.adapter}")
    model = from_lora(base, args.adapter, args.initial)
    with whole_folder(args.out, args.overwrite) as folder:
        model.save_pretrained(folder)
    config = model.peft_config["default"]
    layers = list(layers_of(model, "default"))
    facts = {"path": args.out, "bytes": size(args.out), "method": config.method, "modules": len(layers), "r": config.r}
    out.result(facts, f"{args.out}: {config.method} of rank {config.r} on {len(layers)} modules, the same update")
