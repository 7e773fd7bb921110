"""PiSSA: principal singular values and vectors (arXiv:2404.02948)."""

from __future__ import annotations

from dataclasses import dataclass

from .method import SpectralConfig
from .site import Site, Start


@dataclass(repr=False)
class PiSSAConfig(SpectralConfig):
    """`left @ right` starts as the r largest triples of W, which leave the base (arXiv:2404.02948, eq. 2-4).

    left = U_r sqrt(S_r / s), right = sqrt(S_r / s) V_r^T, so that s left @ right is the top of W whatever alpha is.
    Both learn: r (m + n) parameters a module. Exported as LoRA it has rank 2r. The paper's runs use alpha = r (s = 1,
    the default here) and r = 128 on 7B models.

    The base stays whole: what leaves it is subtracted beside it, so 4-bit bases, unload and several adapters work.

    Example:
        >>> from peft_kasa import PiSSAConfig
        >>> PiSSAConfig(r=16, target_modules="all-linear")
        PiSSAConfig(r=16, target_modules='all-linear')
    """

    name = "pissa"

    def start(self, site: Site) -> Start:
        top = site.svd(site.rank).scaled(1 / site.scale)
        return Start(top.balanced(), ("left", "right"), "start")
