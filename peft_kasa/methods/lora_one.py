"""LoRA-One: a start from one full gradient (arXiv:2502.01235)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..spectral.sources import first_step
from .method import SpectralConfig, require
from .site import Site, Start


@dataclass(repr=False)
class LoRAOneConfig(SpectralConfig):
    """LoRA that starts along the r largest triples of the negative gradient, not at zero (arXiv:2502.01235).

    With -G = U S V^T, left = U sqrt(S / (S_1 gamma)) and right = sqrt(S / (S_1 gamma)) V^T; nothing leaves the base, so
    the start is a step of gradient descent away from the base model. Both learn: r (m + n) parameters a module, rank r
    as LoRA. Needs `calibrate`, with labels.

    Args:
        gamma: how small the start is. Default 128, as in the reference code.
        alpha: None is s = 16 / sqrt(r), as in the paper's runs (rank-stabilised, alpha = 16).

    Examples:
        >>> from peft_kasa import LoRAOneConfig
        >>> LoRAOneConfig(r=4).scale(4, None)
        8.0
    """

    name = "lora_one"
    paper = "2502.01235"
    source = "-gradient, largest triples"
    needs = "gradients"

    gamma: float = 128.0

    def start(self, site: Site) -> Start:
        cut = site.svd(site.rank, of=first_step(site.gradient, "plain"))
        relative = cut.s / cut.s[:1].clamp_min(1e-30)
        return Start(cut._replace(s=relative / self.gamma).balanced(), ("left", "right"))

    def scale(self, rank: int, alpha: float | None) -> float:
        return 16 / math.sqrt(rank) if alpha is None else super().scale(rank, alpha)

    def _check(self) -> None:
        super()._check()
        require(0 < self.gamma < float("inf"), "gamma has to be a number above 0", self.gamma)
