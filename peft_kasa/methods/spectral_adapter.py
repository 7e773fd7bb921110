"""Spectral Adapter: fine-tuning in spectral space, additive or by rotation (arXiv:2405.13952)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .method import SpectralConfig, choice
from .site import PARTS, Part, Site, Start


@dataclass(repr=False)
class SpectralAdapterConfig(SpectralConfig):
    """r singular triples of W are moved, by addition or by rotation (arXiv:2405.13952). Starts at the base model.

    Args:
        variant: "additive" learns U + dU, S + dS, V + dV: r (m + n + 1) parameters a module, rank 2r as LoRA.
            "rotation" learns Cayley rotations within the triples' spaces and factors c of their values,
            U Q(A) diag(S c) Q(B)^T V^T with Q(A) = (I + K)(I - K)^-1, K = (A - A^T) / 2: 2 r^2 + r parameters, rank r.
        part: which triples. The paper tunes the "top" ones, and others where several adapters are to share a base.

    Examples:
        >>> from peft_kasa import SpectralAdapterConfig
        >>> SpectralAdapterConfig(r=8, variant="rotation")
        SpectralAdapterConfig(variant='rotation')
    """

    name = "spectral_adapter"
    paper = "2405.13952"

    variant: Literal["additive", "rotation"] = "additive"
    part: Part = "top"

    @property
    def source(self) -> str:
        return f"W, {PARTS[self.part]} triples"

    def start(self, site: Site) -> Start:
        cut, r = site.svd(site.rank, self.part), site.rank
        if self.variant == "additive":
            return Start(cut.split(), ("left", "core", "right"), "start")
        raw = torch.cat([site.zeros(2 * r * r), site.ones(r)])
        return Start(cut.split()._replace(core=raw), ("core",), "start", cut.s)

    def core(self, raw: Tensor, fixed: Tensor | None, size: int) -> Tensor:
        if fixed is None:
            return raw
        a, b, c = raw.split([size * size, size * size, size])
        return cayley(a.view(size, size)) * (fixed * c) @ cayley(b.view(size, size)).T

    @property
    def shapes_core(self) -> bool:
        return self.variant == "rotation"

    def _check(self) -> None:
        super()._check()
        choice("variant", self.variant, ("additive", "rotation"))
        choice("part", self.part, tuple(PARTS))


def cayley(a: Tensor) -> Tensor:
    """(I + K)(I - K)^-1 with K = (A - A^T) / 2, orthogonal."""
    skew, one = (a - a.T) / 2, torch.eye(len(a), dtype=a.dtype, device=a.device)
    return torch.linalg.solve(one - skew, one + skew)  # the two commute
