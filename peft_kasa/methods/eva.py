"""EVA: explained variance adaptation (arXiv:2410.07170)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..spectral import LowRank
from .method import SpectralConfig
from .site import Site, Start


@dataclass(repr=False)
class EVAConfig(SpectralConfig):
    """LoRA whose R starts at the principal axes of the module's inputs, with L = 0 (arXiv:2410.07170).

    Starts at the base model; both factors learn: r (m + n) parameters a module, rank r as LoRA. The axes are exact, of
    all tokens at once; the paper's code and PEFT's estimate them batch by batch. Needs `calibrate`.

    Args:
        rank_budget: "variance" by default: modules whose inputs have more of their variance in few axes give up ranks.
        rank_spread: the paper's rho: no module gets more than rho r. Default 2.
        alpha: s = alpha / r with the r of the config, whatever rank the budget gives a module, as PEFT adjusts it. With
            ranks that are given (`rank_budget=None`, or a dictionary), s = alpha / rank of each.

    Examples:
        >>> from peft_kasa import EVAConfig
        >>> EVAConfig(r=16, alpha=32).scale(24, 32)
        2.0
    """

    name = "eva"
    paper = "2410.07170"
    source = "inputs, principal axes"
    needs = "inputs"

    rank_budget: Any = "variance"

    def start(self, site: Site) -> Start:
        (m, _), r = site.weight.shape, site.rank
        return Start(LowRank(site.zeros(m, r), site.ones(r), site.axes(r, centred=True)), ("left", "right"))

    def scale(self, rank: int, alpha: float | None) -> float:
        return super().scale(rank if self.rank_budget is None else self.r or rank, alpha)
