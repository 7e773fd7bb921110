"""LoRA-Null: adapters in the null space of the inputs (arXiv:2503.02659)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .method import SpectralConfig, choice
from .site import Site, Start


@dataclass(repr=False)
class LoRANullConfig(SpectralConfig):
    """`left @ right` starts as W Q Q^T, with Q the r directions in which the inputs vary least (arXiv:2503.02659).

    With W Q Q^T = U S V^T, left = U sqrt(S / s), right = sqrt(S / s) V^T; their product leaves the base. What the
    calibration data puts into the module hardly meets the adapter, so what the model knows of it is kept. Needs
    `calibrate`, on samples of what is to be kept.

    Args:
        version: 1 learns both factors: r (m + n) parameters a module, rank 2r as LoRA. 2 freezes right, so that the
            adapter stays in the null space: r m parameters, rank r.

    Examples:
        >>> from peft_kasa import LoRANullConfig
        >>> LoRANullConfig(r=64, version=2)
        LoRANullConfig(r=64, version=2)
    """

    name = "lora_null"
    paper = "2503.02659"
    source = "W on the quietest axes of the inputs"
    needs = "scaled inputs"

    version: Literal[1, 2] = 1

    def start(self, site: Site) -> Start:
        q = site.axes(site.rank, "bottom")
        cut = site.svd(site.rank, of=site.weight @ q.T)
        value = cut._replace(v=cut.v @ q).scaled(1 / site.scale).balanced()
        return Start(value, ("left", "right") if self.version == 1 else ("left",), "start")

    def _check(self) -> None:
        super()._check()
        choice("version", self.version, (1, 2))
