"""SORSA: singular values and orthonormally regularised singular vectors (arXiv:2409.00055)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..spectral import LowRank
from .method import SpectralConfig, require
from .orthogonality import from_orthonormal
from .site import Site, Start


@dataclass(repr=False)
class SORSAConfig(SpectralConfig):
    """U diag(S) V^T starts as the r largest triples of W, all three learn, and U, V are kept near orthonormal
    (arXiv:2409.00055).

    y = (W - s U_r S_r V_r^T) x + s U' diag(S') V'^T x: r (m + n + 1) parameters a module. Exported as LoRA: rank 2r.
    The regulariser of a module is `gamma / 2 (|U'^T U' - I|_F + |V'^T V' - I|_F)`.

    Args:
        gamma: the regulariser's weight in the loss. The paper writes the update as W - eta grad L - gamma grad L_reg:
            its gamma = 4e-4 at eta = 3e-5 is gamma / eta = 13.3 here. The reference code divides that by the
            accumulation steps (64) as well, so its published runs used 0.21, which is the default.

    The norm is smoothed below 1e-5, where the start sits and the reference code follows rounding noise.

    Examples:
        >>> from peft_kasa import SORSAConfig
        >>> SORSAConfig(r=128, gamma=0.5)
        SORSAConfig(r=128, gamma=0.5)
    """

    name = "sorsa"
    paper = "2409.00055"
    source = "W, largest triples"

    gamma: float = 0.21

    def start(self, site: Site) -> Start:
        return Start(site.svd(site.rank).split(), ("left", "core", "right"), "start")

    def penalty(self, trained: LowRank) -> Tensor:
        left = from_orthonormal(trained.left.T @ trained.left)
        return self.gamma / 2 * (left + from_orthonormal(trained.right @ trained.right.T))

    def _check(self) -> None:
        super()._check()
        require(self.gamma >= 0, "gamma has to be at least 0", self.gamma)
