"""LoRA-XS: a small core between frozen singular vectors (arXiv:2405.17604)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..spectral import LowRank
from .method import SpectralConfig, choice, require
from .site import Site, Start


@dataclass(repr=False)
class LoRAXSConfig(SpectralConfig):
    """W + s L K R with L and R frozen at the r largest triples of W; the core K (r, r) learns (arXiv:2405.17604).

    r^2 parameters a module, whatever its size. K starts at N(0, std^2), so that the start is the base model but for
    1e-5. Exported as LoRA it has rank r. `save_frames=False` makes checkpoints of r^2 numbers a module.

    Args:
        sigma: the side with the singular values. "right" is R = S V^T, as in the reference code, "left" is L = U S, as
            in the paper.
        std: of the core's start. 0: exactly the base model.

    Examples:
        >>> from peft_kasa import LoRAXSConfig
        >>> LoRAXSConfig(r=16, target_modules="all-linear", save_frames=False)
        LoRAXSConfig(r=16, target_modules='all-linear', save_frames=False)
    """

    name = "lora_xs"
    paper = "2405.17604"
    source = "W, largest triples"

    sigma: Literal["right", "left"] = "right"
    std: float = 1e-5

    def start(self, site: Site) -> Start:
        u, s, v = site.svd(site.rank)
        core = site.normal(site.rank, site.rank) * self.std
        frames = (u, s[:, None] * v) if self.sigma == "right" else (u * s, v)
        return Start(LowRank(frames[0], core, frames[1]), ("core",))

    def _check(self) -> None:
        super()._check()
        choice("sigma", self.sigma, ("right", "left"))
        require(self.std >= 0, "std has to be at least 0", self.std)
