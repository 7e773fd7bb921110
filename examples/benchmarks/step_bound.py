"""What bounds a training step: the linear layers of one block with adapters, beside the bare products they need.

    python examples/benchmarks/step_bound.py                     # SmolLM2's shapes, two minutes on one CPU core
    python examples/benchmarks/step_bound.py --model my/folder   # of another model: its config is enough

Forward and backward through each layer, by autograd for PEFT's LoRA, the family and the base alone; then the products
alone, without autograd, scales or dropout, for x (t, n) and the output's gradient g (t, m):

    y = x W^T + (x R^T) L^T        dx = g W + (g L) R        dL = g^T (x R^T)        dR = (g L)^T x

with L (m, k), R (k, n). LoRA's k is r, and all of it learns. KaSA and PiSSA have k = 2r, of which r learn: what leaves
the base is subtracted beside it. LoRA-XS has k = r and learns what is between, which is small. All take turns. Compared
is the median over turns of the CPU time of this process (on a GPU, of wall time) over LoRA's in the same turn.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from base_model import smollm2
from measured import commit
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from training_step import DEVICE, Step, describe, in_turns
from transformers import AutoConfig, AutoModelForCausalLM

from peft_kasa import KaSAConfig, LoRAXSConfig, PiSSAConfig

ADAPTERS: dict[str, Callable[..., PeftConfig]] = {
    "LoRA": LoraConfig,
    "KaSA": lambda **given: KaSAConfig(regularize=False, **given),
    "PiSSA": PiSSAConfig,
    "LoRA-XS": LoRAXSConfig,
}


class Pass(NamedTuple):
    """A weight (m, n), what goes into it (t, n), and the gradient of what comes out (t, m)."""

    weight: Tensor
    x: Tensor
    g: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or an id on the Hub; SmolLM2-135M-Instruct by default")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    shapes = shapes_of(given.model or smollm2())
    print(f"{describe()}, torch {torch.__version__}, {torch.get_num_threads()} threads, commit {commit()}")
    print(f"layers {', '.join(f'{m}x{n}' for m, n in shapes)}; r = {given.r}, {given.repeats} turns")
    for dtype in given.dtypes:
        for tokens in given.tokens:
            compare(shapes, getattr(torch, dtype), tokens, given)


def shapes_of(model: str) -> list[tuple[int, int]]:
    """(m, n) of every linear layer but the head, by as many of each as make up a block."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    layers = [layer for layer in whole.modules() if isinstance(layer, nn.Linear)]
    found = Counter(tuple(layer.weight.shape) for layer in layers if layer is not whole.get_output_embeddings())
    blocks = math.gcd(*found.values())
    return [shape for shape, count in found.items() for _ in range(count // blocks)]


def compare(shapes: list[tuple[int, int]], dtype: torch.dtype, tokens: int, given: argparse.Namespace) -> None:
    torch.manual_seed(0)
    made = {"dtype": dtype, "device": DEVICE}
    sizes = [((m, n), (tokens, n), (tokens, m)) for m, n in shapes]
    passes = [Pass(*(torch.randn(size, **made) * 0.02 for size in three)) for three in sizes]
    r = given.r
    steps = {"base alone": layers_step(base_of(passes), passes)}
    for name, config in ADAPTERS.items():
        steps[name] = layers_step(adapted(passes, config(r=r, target_modules=r"\d+")), passes)
    steps["bare products: the base's"] = products_step(passes, 0, 0)
    steps["bare products: LoRA's"] = products_step(passes, r, r)
    steps["bare products: KaSA's, PiSSA's"] = products_step(passes, 2 * r, r)
    steps["bare products: LoRA-XS's"] = products_step(passes, r, 0)
    times = in_turns(steps, given.repeats)
    print(f"\n{str(dtype).removeprefix('torch.')}, {tokens} tokens\n{'':32}     ms  of LoRA's  above the base, ms")
    for name, own in times.items():
        base = times["bare products: the base's" if name.startswith("bare") else "base alone"]
        ratio = statistics.median(a / b for a, b in zip(own, times["LoRA"], strict=True))
        above = statistics.median(a - b for a, b in zip(own, base, strict=True))
        print(f"{name:32} {1000 * statistics.median(own):6.1f}  {ratio:9.3f}  {1000 * above:18.1f}", flush=True)


def base_of(passes: list[Pass]) -> nn.Sequential:
    """The layers, side by side: nothing goes from one to the next."""
    layers = []
    for one in passes:
        layers.append(nn.Linear(*reversed(one.weight.shape), bias=False, device="meta"))
        layers[-1].weight = nn.Parameter(one.weight.clone(), requires_grad=False)
    return nn.Sequential(*layers)


def adapted(passes: list[Pass], config: PeftConfig) -> nn.Sequential:
    return get_peft_model(base_of(passes), config).train().base_model.model


def layers_step(layers: nn.Sequential, passes: list[Pass]) -> Step:
    """As in a model: gradients of inputs, and of what learns."""

    def step() -> None:
        for layer, one in zip(layers, passes, strict=True):
            layer(one.x.detach().requires_grad_()).backward(one.g)
        layers.zero_grad()

    return step


def products_step(passes: list[Pass], k: int, learn: int) -> Step:
    """The products alone, with factors of k columns (0: the base's alone) of which `learn` have gradients."""
    pairs = [(torch.randn_like(one.weight[:, :k]), torch.randn_like(one.weight[:k])) for one in passes]

    @torch.no_grad()
    def step() -> None:
        for (w, x, g), (left, right) in zip(passes, pairs, strict=True):
            y, dx = x @ w.T, g @ w
            if not k:
                continue
            z, h = x @ right.T, g @ left
            torch.addmm(y, z, left.T)
            torch.addmm(dx, h, right)
            if learn:
                g.T @ z[:, :learn], h[:, :learn].T @ x

    return step


if __name__ == "__main__":
    main()
