"""How many numbers a method trains in a model, from shapes alone."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from ..calibration.targets import targets
from ..methods.method import SpectralConfig
from ..methods.site import Site
from ..spectral.plan import Outline


def shapes(model: nn.Module, config: SpectralConfig) -> Counter[tuple[int, int]]:
    """How many modules of each shape (m, n) a config's targets have."""
    found: Counter[tuple[int, int]] = Counter()
    for module in targets(model, config).values():
        turned = not hasattr(module, "in_features")  # Conv1D keeps (n, m)
        m, n = module.weight.shape  # type: ignore[misc, union-attr]
        found[(n, m) if turned else (m, n)] += 1
    return found


def learns(config: SpectralConfig, sizes: Counter[tuple[int, int]]) -> int | None:
    """How many numbers learn in modules of these shapes. None: the config does not fit the smallest of them."""
    try:
        return sum(count * _in_module(config, m, n) for (m, n), count in sizes.items())
    except ValueError:
        return None


def _in_module(config: SpectralConfig, m: int, n: int) -> int:
    weight = torch.empty(m, n, device="meta")
    rank = min(config.r or m, m, n)
    start = config.start(Site("", weight, rank, config.scale(rank, config.alpha), torch.Generator(), Outline(weight)))
    return sum(getattr(start.trained, slot).numel() for slot in start.train)
