"""MiLoRA: minor singular components (arXiv:2406.09044)."""

from __future__ import annotations

from dataclasses import dataclass

from .method import SpectralConfig, choice
from .site import PARTS, Part, Site, Start


@dataclass(repr=False)
class MiLoRAConfig(SpectralConfig):
    """`left @ right` starts as the r smallest triples of W, which leave the base (arXiv:2406.09044).

    left = U sqrt(S / s), right = sqrt(S / s) V^T over the last r triples. Both learn: r (m + n) parameters a module.
    Exported as LoRA it has rank 2r. The paper's runs use alpha = r (s = 1, the default here), r = 64 on LLaMA-2-7B.

    Args:
        part: which r triples. "bottom" is MiLoRA; its code also has the "middle" and "random" ones, to compare.

    Examples:
        >>> from peft_kasa import MiLoRAConfig
        >>> MiLoRAConfig(r=64, target_modules=["q_proj"])
        MiLoRAConfig(r=64, target_modules={'q_proj'})
    """

    name = "milora"
    paper = "2406.09044"

    part: Part = "bottom"

    @property
    def source(self) -> str:
        return f"W, {PARTS[self.part]} triples"

    def start(self, site: Site) -> Start:
        cut = site.svd(site.rank, self.part).scaled(1 / site.scale)
        return Start(cut.balanced(), ("left", "right"), "start")

    def _check(self) -> None:
        super()._check()
        choice("part", self.part, tuple(PARTS))
