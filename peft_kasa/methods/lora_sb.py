"""LoRA-SB: the core of the best cut of a first optimiser step (arXiv:2411.19557)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..spectral import LowRank
from ..spectral.sources import first_step
from .method import SpectralConfig, require
from .site import Site, Start


@dataclass(repr=False)
class LoRASBConfig(SpectralConfig):
    """W + s U K V^T, U and V frozen at the r largest triples of Adam's first step; K learns (arXiv:2411.19557).

    That step is -eta sign(G), G the mean gradient of the loss by W; K starts at its singular values, so the start is
    the best rank-r approximation of a step of full fine-tuning, not the base model. r^2 parameters a module, rank r as
    LoRA. Needs `calibrate`, with labels. Clients that share U and V average K exactly: `average_cores` (Fed-SB).

    Args:
        step_size: eta. The reference code takes the learning rate over the number of warm-up steps: 3e-7 to 1e-6 in
            its recipes. 0: the base model.

    Examples:
        >>> from peft_kasa import LoRASBConfig
        >>> LoRASBConfig(r=96, step_size=2e-5).needs
        'gradients'
    """

    name = "lora_sb"
    paper = "2411.19557"
    source = "-sign(gradient), largest triples"
    needs = "gradients"

    step_size: float = 1e-6

    def start(self, site: Site) -> Start:
        u, s, v = site.svd(site.rank, of=first_step(site.gradient, "sign"))
        return Start(LowRank(u, torch.diag(s * self.step_size / site.scale), v), ("core",))

    def _check(self) -> None:
        super()._check()
        require(0 <= self.step_size < float("inf"), "step_size has to be a number of at least 0", self.step_size)
