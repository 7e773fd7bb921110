"""SVF: singular value fine-tuning, of Transformer-squared (arXiv:2501.06252)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .method import SpectralConfig, choice
from .site import Site, Start

GATE = 0.1  # where the code's gates start; it adds N(0, 0.01^2)


@dataclass(repr=False)
class SVFConfig(SpectralConfig):
    """Each singular value of W is scaled by a number that learns (arXiv:2501.06252).

    y = U diag(S z) V^T x, with z = 1 at the start: min(m, n) parameters a module. Only V^T is kept, since
    U diag(S (z - 1)) V^T x = W V diag(z - 1) V^T x: the base weight itself is applied, and what U would take is
    saved. Checkpoints hold z alone, unless `save_frames=True`. Exported as LoRA it has rank min(m, n), or r.

    Args:
        r: how many of the largest values learn. None, as in the paper: all.
        form: "plain" learns z. "gate" learns p, z = sigmoid(p), and rescales by sum S / sum(S z), as the reference code
            does: the sum of the singular values stays, the map starts at W whatever p is.

    Examples:
        >>> from peft_kasa import SVFConfig
        >>> SVFConfig(target_modules=["up_proj", "gate_proj", "down_proj"], form="gate").r is None
        True
    """

    name = "svf"
    paper = "2501.06252"
    source = "W, all triples"
    compact = True

    r: int | None = None
    form: Literal["plain", "gate"] = "plain"

    def start(self, site: Site) -> Start:
        cut = site.svd(site.rank)
        gated = self.form == "gate"
        raw = site.ones(site.rank) * (GATE if gated else 1)
        fixed = cut.s if gated else None
        return Start(cut.split()._replace(core=raw), ("core",), "start", fixed, through_base=True)

    def core(self, raw: Tensor, fixed: Tensor | None, size: int) -> Tensor:
        if fixed is None:
            return raw
        z = torch.sigmoid(raw)
        return z * fixed.sum() / (fixed * z).sum().clamp_min(torch.finfo(z.dtype).tiny)

    @property
    def shapes_core(self) -> bool:
        return self.form == "gate"

    def _check(self) -> None:
        super()._check()
        choice("form", self.form, ("plain", "gate"))
