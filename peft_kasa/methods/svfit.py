"""SVFit: the singular values alone (arXiv:2409.05926)."""

from __future__ import annotations

from dataclasses import dataclass

from .method import SpectralConfig
from .site import Site, Start


@dataclass(repr=False)
class SVFitConfig(SpectralConfig):
    """Only the r largest singular values of W learn; their vectors stay (arXiv:2409.05926).

    y = W x + s U_r diag(S' - S_r) V_r^T x, with S' = S_r at the start: r parameters a module. Exported as LoRA it has
    rank r. The default r = 128 is ours: the paper counts 16 times fewer parameters than LoRA's r = 8, which for
    RoBERTa-base means r = min(m, n) = 768. No public code of the paper is known.

    Examples:
        >>> from peft_kasa import SVFitConfig
        >>> SVFitConfig(target_modules="all-linear").r
        128
    """

    name = "svfit"
    paper = "2409.05926"
    source = "W, largest triples"

    r: int | None = 128

    def start(self, site: Site) -> Start:
        return Start(site.svd(site.rank).split(), ("core",), "start")
