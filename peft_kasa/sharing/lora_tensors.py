"""Exact updates as the tensors of PEFT's LoRA: of a linear layer, and of a stack of experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..adapter.experts.expert import SpectralExpert
from ..adapter.layer import SpectralLinear
from ..spectral import LowRank

Pair = tuple[Tensor, Tensor]  # B (m, r) and A (r, n)


def plain(layers: Mapping[str, SpectralLinear], values: Mapping[str, LowRank]) -> dict[str, Pair]:
    """B (m, r) and A (r, n) of each linear layer, by its name."""
    return {name: values[name].factors() for name, layer in layers.items() if not isinstance(layer, SpectralExpert)}


def stacked(layers: Mapping[str, SpectralLinear], values: Mapping[str, LowRank]) -> dict[str, Pair]:
    """B (m, r E) and A (r E, n) of each stack of E experts, by the path that PEFT's LoRA for parameters has in a model.

    A has the rows of an expert next to each other, B the columns of all experts for one of the r. PEFT wraps the
    parameters of a module one around the other, in the module's order: the last is the outermost.
    """
    stacks: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if isinstance(layer, SpectralExpert):
            stacks.setdefault(layer.pattern_name, []).append(name)
    pairs = {}
    for stack, names in stacks.items():
        ups, downs = zip(*(values[name].factors() for name in names), strict=True)
        pairs[_path(stack, stacks, layers[names[0]])] = (torch.stack(ups, 2).flatten(1), torch.cat(downs))
    return pairs


def _path(stack: str, stacks: Mapping[str, object], expert: SpectralLinear) -> str:
    module, _, parameter = stack.rpartition(".")
    order = [name for name, _ in expert.base_layer.owner[0].named_parameters(recurse=False)]  # type: ignore[index, union-attr]
    around = [name for name in order[order.index(parameter) + 1 :] if f"{module}.{name}" in stacks]
    return module + ".base_layer" * len(around)
