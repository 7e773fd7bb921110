"""16-bit and 4-bit storage put back what KaSA takes out of a base weight: the case for a frozen side factor.

    python examples/benchmarks/storage.py            # a minute or two on two CPU cores
    python examples/benchmarks/storage.py --quick    # tiny synthetic weights only, seconds

KaSA starts from W less its r = 8 smallest singular triples. They are small beside the rounding of W's entries, so a
weight that is written back in the checkpoint's format still has most of them. Printed is the share that is still there:
|stored V| / |W V|, V the r right singular vectors that were dropped. 0 % is a clean cut, 100 % is none at all. W holds
values of the format to begin with, as a checkpoint does.

The last column is what peft_kasa does: W stays as it is stored, and U S V^T x is subtracted beside it, in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from base_model import smollm2
from matrices import llm_like
from torch import Tensor

from peft_kasa.spectral import Engine

RANK = 8
SHAPES = [(2048, 2048), (4096, 4096), (1024, 4096), (4096, 1024), (4096, 11008)]
QUICK = [(256, 256), (128, 320)]
MODULES = ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"]
ENGINE = Engine(precision="float64", cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny synthetic weights only")
    quick = parser.parse_args().quick
    stores = formats()
    print(f"Share of the {RANK} smallest triples' norm that is still there, and the side factor's residue")
    print(f"{'weight':42}" + "".join(f"{name:>8}" for name in stores) + f"{'side factor':>14}")
    for name, w in weights(quick):
        shares = [f"{share(w, store):.1%}" for store in stores.values()]
        print(f"{name:42}" + "".join(f"{text:>8}" for text in shares) + f"{beside(w):14.1e}", flush=True)


def formats() -> dict[str, Callable[[Tensor], Tensor]]:
    """By name: what a float32 weight reads as after it was stored."""
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "bf16": lambda w: w.bfloat16().float(),
        "fp16": lambda w: w.half().float(),
    }
    try:
        from bitsandbytes import functional
    except ImportError:
        print("nf4 is left out: it needs bitsandbytes")
        return found

    def nf4(w: Tensor) -> Tensor:
        return functional.dequantize_4bit(*functional.quantize_4bit(w, quant_type="nf4"))

    return found | {"nf4": nf4}


def weights(quick: bool) -> Iterator[tuple[str, Tensor]]:
    for m, n in QUICK if quick else SHAPES:
        yield f"{m}x{n}, synthetic", llm_like(m, n)
    if quick:
        return
    from transformers import AutoModelForCausalLM

    layer = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).model.layers[10]
    for name in MODULES:
        weight = layer.get_submodule(name).weight.detach()
        yield "{}x{}, SmolLM2's {}".format(*weight.shape, name), weight


def share(w: Tensor, store: Callable[[Tensor], Tensor]) -> float:
    w = store(w)
    cut = ENGINE(w, RANK, "bottom")
    stored = store((w.double() - cut.split().dense()).float())
    return ((stored.double() @ cut.v.T).norm() / (w.double() @ cut.v.T).norm()).item()


def beside(w: Tensor) -> float:
    """The same for W x - U S V^T x with float32 factors, in exact products."""
    exact = ENGINE(w, RANK, "bottom").v.double().T
    cut = Engine(cache=False)(w, RANK, "bottom")
    image = w.double() @ exact
    left = image - (cut.u.double() * cut.s.double()) @ (cut.v.double() @ exact)
    return (left.norm() / image.norm()).item()


if __name__ == "__main__":
    main()
