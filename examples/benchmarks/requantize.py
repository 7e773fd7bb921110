"""The quantisation error of nf4 with and without `requantize` (QPiSSA), on SmolLM2-135M-Instruct: prints a table.

    python examples/benchmarks/requantize.py            # a few minutes on two CPU cores
    python examples/benchmarks/requantize.py --quick    # one block, r = 8: seconds

The seven linear layers of three blocks. For each rank: |W - (Q + A B)| in the nuclear norm (sum of singular values),
which QPiSSA's paper reports, and in the Frobenius norm, as the share that is less than with plain nf4, summed over
modules. QLoRA has A B = 0. LoftQ starts its alternation at Q = nf4(W), QPiSSA at A B = the largest triples of W.

Then all 210 layers, r = 64, 5 iterations: the loss on a text (the repository's licence), and the Kullback-Leibler
divergence of the next token's distribution from the float model's, before and after.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from base_model import smollm2
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from peft_kasa import PiSSAConfig, SpectralLinear, requantize
from peft_kasa.spectral import Engine

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one block and one rank")
    quick = parser.parse_args().quick
    logging.disable_progress_bar()
    blocks, ranks = ([14], [8]) if quick else ([4, 14, 24], [8, 64, 128])
    true = dict(AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).named_parameters())
    base = AutoModelForCausalLM.from_pretrained(smollm2(), quantization_config=NF4, dtype=torch.float32)
    print("| r | iterations | LoftQ, nuclear | QPiSSA, nuclear | LoftQ, Frobenius | QPiSSA, Frobenius |")
    print("|---|---|---|---|---|---|")
    for rank in ranks:
        for iterations in (1, 5):
            base, row = measured(base, true, PiSSAConfig(r=rank, target_modules=names(blocks)), iterations)
            print(f"| {rank} | {iterations} | " + " | ".join(f"{gain:.1%}" for gain in row) + " |", flush=True)
    if not quick:
        outputs(base)


def names(blocks: list[int]) -> str:
    return rf".*\.layers\.({'|'.join(map(str, blocks))})\..*\.({'|'.join(PROJECTIONS)})"


@torch.no_grad()
def measured(base: Any, true: dict[str, Tensor], config: PiSSAConfig, iterations: int) -> tuple[Any, list[float]]:
    """The base as it was, and what LoftQ's and QPiSSA's errors are less than plain nf4's."""
    model = get_peft_model(base, config)
    layers = [module for module in model.modules() if isinstance(module, SpectralLinear)]
    weights = {layer.name: true[f"{layer.name}.weight"] for layer in layers}
    plain = errors([weights[layer.name] - layer.base.matrix() for layer in layers])
    theirs = errors([loftq(layer, weights[layer.name], config.r, iterations) for layer in layers])
    report = requantize(model, true, iterations=iterations)
    ours = errors([weights[layer.name] - layer.base.matrix() for layer in layers])
    assert abs(report.gain - (1 - (ours[1] / plain[1]).item())) < 1e-3
    gains = [1 - (found[norm] / plain[norm]).item() for norm in (0, 1) for found in (theirs, ours)]
    return model.unload(), gains


def outputs(base: Any) -> None:
    true = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    text = Path(__file__).resolve().parents[2].joinpath("LICENSE").read_text()
    ids = AutoTokenizer.from_pretrained(smollm2())(text, return_tensors="pt").input_ids[:, :512]
    expected, loss = predicted(true, ids)
    print(f"float: loss {loss:.3f}")
    model = get_peft_model(base, PiSSAConfig(r=64, target_modules="all-linear"))
    for step in (lambda: "nf4", lambda: requantize(model, true)):
        name, (found, loss) = step(), predicted(model, ids)
        divergence = (expected.exp() * (expected - found)).sum(-1).mean()
        print(f"{name}: loss {loss:.3f}, divergence {divergence:.3f}", flush=True)


@torch.no_grad()
def predicted(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    """Log-probabilities (tokens, words), and the loss."""
    found = model.eval()(input_ids=ids, labels=ids)
    return found.logits[0].float().log_softmax(-1), found.loss.item()


def errors(differences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of the nuclear norms, and the Frobenius norm of all."""
    spectra = [torch.linalg.svdvals(difference) for difference in differences]
    return torch.stack([s.sum() for s in spectra]).sum(), torch.cat(spectra).norm()


def loftq(layer: SpectralLinear, weight: Tensor, rank: int, iterations: int) -> Tensor:
    """W - (Q + A B): Q = nf4(W - A B), A B = best of rank r (W - Q), from A B = 0 on."""
    like: Any = layer.base.four_bits()
    taken = torch.zeros_like(weight)
    for _ in range(iterations):
        rest = weight - like.quantized(weight - taken).matrix()
        taken = Engine()(rest, rank).split().dense()
    return rest - taken


if __name__ == "__main__":
    main()
