"""NLoRA, SLoRA and IntTune: adapters from slices of the weight (arXiv:2502.14482)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..spectral import LowRank
from .method import SpectralConfig, choice, require
from .site import Site, Slot, Start


@dataclass(repr=False)
class NLoRAConfig(SpectralConfig):
    """W + s L K R with a core K (r, r) between LoRA's factors, started from slices of W (arXiv:2502.14482).

    Args:
        variant: "nlora" starts at L = W[:, :r], K = W[:r, :r], R = W[:r, :], all three learn: r (m + n) + r^2
            parameters a module. "inttune" starts there too, and K alone learns: r^2. "slora" starts at L = 0, K and R
            Kaiming uniform: the base model, no decomposition at all.
        pseudo_inverse: K = pinv(W[:r, :r]) instead, so that L K R is Nystrom's approximation of W, which then leaves
            the base: the start is the base model. Off, as in the reference code, nothing leaves, and the start is the
            base model plus a small product. Not for "slora".

    Exported as LoRA it has rank r (with the pseudo-inverse 2r, but for "inttune"). The paper uses r = alpha = 128.

    Examples:
        >>> from peft_kasa import NLoRAConfig
        >>> NLoRAConfig(r=16, variant="inttune")
        NLoRAConfig(r=16, variant='inttune')
    """

    name = "nlora"
    paper = "2502.14482"

    variant: Literal["nlora", "slora", "inttune"] = "nlora"
    pseudo_inverse: bool = False

    @property
    def source(self) -> str:
        return "nothing" if self.variant == "slora" else "W, first rows and columns"

    def start(self, site: Site) -> Start:
        (m, n), r = site.weight.shape, site.rank
        train: tuple[Slot, ...] = ("core",) if self.variant == "inttune" else ("left", "core", "right")
        if self.variant == "slora":
            core = site.kaiming_uniform(r, r)
            return Start(LowRank(site.zeros(m, r), core, site.kaiming_uniform(r, n)), train)
        return Start(site.slices(r, self.pseudo_inverse), train, "start" if self.pseudo_inverse else None)

    def _check(self) -> None:
        super()._check()
        choice("variant", self.variant, ("nlora", "slora", "inttune"))
        inverts = self.pseudo_inverse and self.variant == "slora"
        require(not inverts, "pseudo_inverse is not for variant='slora'", self.pseudo_inverse)
