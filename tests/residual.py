"""Models on a requantised base, and what their 4-bit layers hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bases import load
from members import MEMBERS, Member
from peft import get_peft_model
from torch import nn

from peft_kasa import SpectralLinear, requantize

ITERATING = ("pissa", "sorsa", "svfit", "spectral_adapter")  # they start at the largest triples
ONCE = ("milora", "corda", "lora_null")
ABLE = [member for member in MEMBERS if member.name in (*ITERATING, *ONCE)]
UNABLE = [member for member in MEMBERS if member not in ABLE]
PISSA = next(member for member in MEMBERS if member.name == "pissa")


def layers(model: nn.Module) -> list[SpectralLinear]:
    return [module for module in model.modules() if isinstance(module, SpectralLinear)]


def bits(model: nn.Module) -> Iterator[torch.Tensor]:
    """All that the 4-bit layers hold."""
    for layer in layers(model):
        layer.base.unpack()
        yield from layer.base.four_bits().tensors().values()


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def times(member: Member) -> int:
    return 5 if member.name in ITERATING else 1


def requantized(member: Member, tiny: str, kind: str = "nf4") -> Any:
    model = get_peft_model(load(tiny, kind), member.config(r=8))
    requantize(model, tiny, iterations=times(member))
    return model
