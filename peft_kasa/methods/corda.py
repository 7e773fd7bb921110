"""CorDA: context-oriented decomposition (arXiv:2406.05223)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .method import SpectralConfig, choice, require
from .site import Site, Start


@dataclass(repr=False)
class CorDAConfig(SpectralConfig):
    """`left @ right` starts as triples of W C, C the inputs' second moment, taken back to W (arXiv:2406.05223).

    With W C = U S V^T, left = U sqrt(S / s) and right = sqrt(S / s) V^T C^-1; their product leaves the base, both
    learn: r (m + n) parameters a module, rank 2r as LoRA. Needs `calibrate`. No inverse of C is taken, since
    V^T C^-1 = S^-1 U^T W; C is damped once, as the paper's code begins, and that is never doubled.

    Args:
        mode: "instruction" adapts the r largest triples (the paper's instruction-previewed adaptation, on samples of
            the new task). "knowledge" adapts the r smallest (knowledge-preserved, on samples of what is to be kept).
        damping: the share of C's mean diagonal that is added to it.
        power: 1 orients by C as the paper does, 0.5 by C^(1/2): the r triples that miss least of the outputs W x.

    Examples:
        >>> from peft_kasa import CorDAConfig
        >>> CorDAConfig(r=128, mode="knowledge").needs
        'scaled inputs'
    """

    name = "corda"
    paper = "2406.05223"
    needs = "scaled inputs"

    mode: Literal["instruction", "knowledge"] = "instruction"
    damping: float = 0.01
    power: float = 1.0

    @property
    def source(self) -> str:
        return f"W C, {'largest' if self.mode == 'instruction' else 'smallest'} triples"

    def start(self, site: Site) -> Start:
        part: Literal["top", "bottom"] = "top" if self.mode == "instruction" else "bottom"
        cut = site.oriented(site.rank, part, self.damping, self.power)
        return Start(cut.scaled(1 / site.scale).balanced(), ("left", "right"), "start")

    def _check(self) -> None:
        super()._check()
        choice("mode", self.mode, ("instruction", "knowledge"))
        require(0 <= self.damping < float("inf"), "damping has to be a number of at least 0", self.damping)
        require(0 < self.power <= 1, "power has to be 0 < power <= 1", self.power)
