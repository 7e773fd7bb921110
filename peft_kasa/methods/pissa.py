"""PiSSA: principal singular values and vectors (arXiv:2404.02948)."""

from __future__ import annotations

from dataclasses import dataclass

from .method import SpectralConfig, choice
from .site import PARTS, Part, Site, Start


@dataclass(repr=False)
class PiSSAConfig(SpectralConfig):
    """`left @ right` starts as the r largest triples of W, which leave the base (arXiv:2404.02948, eq. 2-4).

    left = U_r sqrt(S_r / s), right = sqrt(S_r / s) V_r^T, so that s left @ right is the top of W whatever alpha is.
    Both learn: r (m + n) parameters a module. Exported as LoRA it has rank 2r. The paper's runs use alpha = r (s = 1,
    the default here) and r = 128 on 7B models.

    The base stays whole: what leaves it is subtracted beside it, so 4-bit bases, unload and several adapters work.

    Args:
        part: which r triples. "top" is PiSSA; the others begin from the smallest, the middle or random ones.

    Examples:
        >>> from peft_kasa import PiSSAConfig
        >>> PiSSAConfig(r=16, target_modules="all-linear")
        PiSSAConfig(r=16, target_modules='all-linear')
    """

    name = "pissa"
    paper = "2404.02948"

    part: Part = "top"

    @property
    def source(self) -> str:
        return f"W, {PARTS[self.part]} triples"

    def start(self, site: Site) -> Start:
        cut = site.svd(site.rank, self.part).scaled(1 / site.scale)
        return Start(cut.balanced(), ("left", "right"), "start")

    def _check(self) -> None:
        super()._check()
        choice("part", self.part, tuple(PARTS))
