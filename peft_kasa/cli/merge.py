"""`peft-kasa merge`: a model with an adapter's update in its weights."""

from __future__ import annotations

import re
import warnings
from argparse import Namespace

from peft_kasa_cli.output import Output

from ..adapter.files.checkpoint import DRIFT
from ..adapter.starting import all_layers
from .folders import check_free, size, whole_folder
from .models import adapter_config, base_of, load_adapter, tokenizer_of


def run(args: Namespace, out: Output) -> None:
    """Writes the merged model, and says what rounding to the weights' storage lost of the update."""
    base = base_of(adapter_config(args.adapter), args.base, args.adapter)
    check_free(args.out, args.overwrite, args.adapter, base)
    out.note(f"loading {args.adapter} and its base")
    with warnings.catch_warnings():
        if args.dtype != "auto":  # another storage was asked for
            warnings.filterwarnings("ignore", re.escape(DRIFT))
        model = load_adapter(args.adapter, args.base, args.dtype)
    tokenizer = tokenizer_of(base)
    layers = list(all_layers(model))
    out.note(f"merging {len(layers)} modules into {args.out}")
    merged = model.merge_and_unload(safe_merge=True)
    with whole_folder(args.out, args.overwrite) as folder:
        merged.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    lost = max(layer.merge_rounding for layer in layers)
    data = {
        "path": args.out,
        "bytes": size(args.out),
        "modules": len(layers),
        "dtype": str(merged.dtype).removeprefix("torch."),
        "rounding": lost,
        "tokenizer": tokenizer is not None,
    }
    told = f"Rounding to it lost up to {lost:.1%} of an update." if lost else "Nothing was lost to rounding."
    out.result(data, f"{args.out}: {len(layers)} modules merged, weights in {data['dtype']}. {told}")
