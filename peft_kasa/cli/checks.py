"""What `peft-kasa doctor` tries, each on a tiny layer: it answers in a few words, or raises."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from ..methods import KaSAConfig, methods
from ..peft_type import NAME
from ..spectral import Engine

SIZE = 128  # of the layers: whole blocks of 4-bit storage
EXACT = 1e-5


class Check(NamedTuple):
    """One thing to try; `needed` if nothing works without."""

    name: str
    needed: bool
    run: Callable[[], str]


def registered() -> str:
    """Whether PEFT knows the family."""
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME]) is None:
        raise RuntimeError(f"PEFT has no type {NAME}: import peft_kasa did not register it")
    return f"PEFT knows {NAME}: {len(methods())} methods"


def decompositions() -> str:
    """Whether a decomposition is what LAPACK's is."""
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    found, exact = Engine(cache=False)(weight, 4).s.double(), torch.linalg.svdvals(weight.double())[:4]
    error = ((found - exact).abs().max() / exact[0]).item()
    if error > EXACT:
        raise RuntimeError(f"singular values differ from LAPACK's by {error:.1e}, more than {EXACT:.0e}")
    return f"singular values within {error:.0e} of LAPACK's"


def saving() -> str:
    """Whether an adapter comes back as it was."""
    model, x = adapter(plain()), sample()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        PeftConfig.from_pretrained(folder)
        again = PeftModel.from_pretrained(plain(), folder)
        with torch.no_grad():
            if not torch.equal(model.eval()(x), again.eval()(x)):
                raise RuntimeError("an adapter that was saved and loaded gives other outputs")
    return "saved and loaded bit for bit"


def training(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
    """Whether a step of KaSA on a base lowers a loss."""
    torch.manual_seed(0)
    model, x = adapter(make().to(device)), sample().to(device, dtype)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"three steps took the loss from {losses[0]:.3g} to {losses[-1]:.3g}")
    return f"KaSA trains: loss {losses[0]:.3f} to {losses[-1]:.3f}"


def bitsandbytes(bits: int) -> Callable[[], str]:
    """Training on a layer in 4 or 8 bits, on CUDA where it is."""

    def run() -> str:
        layers = import_module("bitsandbytes").nn
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = layers.Linear4bit if bits == 4 else layers.Linear8bitLt
        options: dict[str, Any] = {"quant_type": "nf4"} if bits == 4 else {"has_fp16_weights": False}

        def make() -> nn.Module:
            made = kind(SIZE, SIZE, bias=False, **options)
            made.load_state_dict(plain()[0].state_dict())
            made = made.to(device)  # this quantises
            if made.weight.is_floating_point():
                raise RuntimeError(f"the layer was not quantised: its weight is {made.weight.dtype}")
            return nn.Sequential(made)

        return f"{training(make, device=device)} ({device})"

    return run


def torchao() -> str:
    """Training on a layer in torchao's int8."""
    quantization = import_module("torchao.quantization")

    def make() -> nn.Module:
        model = plain()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    return training(make)


def devices() -> str:
    """Where tensors can be, a step on each."""
    found = [f"cpu ({torch.get_num_threads()} threads)"]
    for number in range(torch.cuda.device_count()):
        training(plain, device=f"cuda:{number}")
        found.append(f"cuda:{number} ({torch.cuda.get_device_name(number)})")
    if torch.backends.mps.is_available():
        training(plain, device="mps")
        found.append("mps")
    return ", ".join(found)


def trl() -> str:
    """Whether `peft-kasa sft` can run."""
    import_module("datasets")
    return f"TRL {import_module('trl').__version__}: peft-kasa sft"


def plain() -> nn.Sequential:
    """The same layer at each call."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight.data = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    return nn.Sequential(layer)


def adapter(base: nn.Module) -> Any:
    """The base with KaSA."""
    return get_peft_model(base, KaSAConfig(r=4, target_modules=["0"]))  # type: ignore[arg-type]


def sample() -> torch.Tensor:
    """Inputs (8, SIZE)."""
    return torch.randn(8, SIZE, generator=torch.Generator().manual_seed(1))


CHECKS = [
    Check("plug-in", True, registered),
    Check("decomposition", True, decompositions),
    Check("save and load", True, saving),
    Check("float32", True, lambda: training(plain)),
    Check("bfloat16", False, lambda: training(lambda: plain().to(torch.bfloat16), torch.bfloat16)),
    Check("devices", False, devices),
    Check("bitsandbytes 4-bit", False, bitsandbytes(4)),
    Check("bitsandbytes 8-bit", False, bitsandbytes(8)),
    Check("torchao int8", False, torchao),
    Check("trl", False, trl),
]
