"""SVFT: a sparse core between all singular vectors (arXiv:2405.19597)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..spectral import LowRank, Spectrum
from .method import SpectralConfig, choice, require
from .site import Site, Start


@dataclass(repr=False)
class SVFTConfig(SpectralConfig):
    """W + U M V^T with frozen singular vectors and a sparse M that learns (arXiv:2405.19597).

    M has k = min(m, n) rows and columns, k (2d + 1) - d (d + 1) entries of which learn (k for "plain"), and one gate:
    y = W x + s U (M sigmoid(g)) V^T x. Exported as LoRA it has rank k. U and V take as much memory as W, so checkpoints
    leave them out unless `save_frames=True`. M is formed as a (k, k) matrix in each step.

    Args:
        r: the number of singular vectors of each side. None, as in the paper: all.
        pattern: where M may differ from 0. "plain": its diagonal. "banded": |i - j| <= width. "random": as many entries
            anywhere, each once. "top_k": as many where |u_i . v_j| is largest (over the first min(m, n) coordinates if
            W is not square), independent of signs.
        width: d, the off-diagonals on either side that set the number of entries; not for "plain".
        gate: whether M is multiplied by sigmoid(g), with g = 0 at the start, as in the reference code.
        init: "zero" starts at the base model. "reference" is N(0, 2 / entries), as the reference code has it.

    Examples:
        >>> from peft_kasa import SVFTConfig
        >>> SVFTConfig(pattern="banded", width=2, target_modules="all-linear").keeps_frames
        False
    """

    name = "svft"
    paper = "2405.19597"
    source = "W, all triples"
    compact = True

    r: int | None = None
    pattern: Literal["plain", "banded", "random", "top_k"] = "plain"
    width: int = 0
    gate: bool = True
    init: Literal["zero", "reference"] = "zero"

    def start(self, site: Site) -> Start:
        cut, k = site.svd(site.rank), site.rank
        width = min(self.width, k - 1)
        count = k if self.pattern == "plain" else k * (2 * width + 1) - width * (width + 1)
        values = site.zeros(count) if self.init == "zero" else site.normal(count) * (2 / count) ** 0.5
        raw = torch.cat([values, site.zeros(1)]) if self.gate else values
        fixed = None if self.pattern == "plain" else self._entries(site, cut, count, width)
        return Start(LowRank(cut.u, raw, cut.v), ("core",), None, fixed)

    def core(self, raw: Tensor, fixed: Tensor | None, size: int) -> Tensor:
        values = raw[:-1] * torch.sigmoid(raw[-1]) if self.gate else raw
        if fixed is None:
            return values
        return values.new_zeros(size, size).index_put(tuple(fixed.long()), values)

    @property
    def averages(self) -> bool:
        return not self.gate

    def _entries(self, site: Site, cut: Spectrum, count: int, width: int) -> Tensor:
        """Rows and columns (2, count), row by row."""
        k = len(cut.s)
        if site.weight.is_meta:
            return site.zeros(2, count)
        if self.pattern == "banded":
            index = torch.arange(k, device=cut.s.device)
            chosen = ((index[:, None] - index).abs() <= width).flatten().nonzero()[:, 0]
        elif self.pattern == "random":
            chosen = torch.randperm(k * k, generator=site.generator)[:count].to(cut.s.device)
        else:
            q = min(site.weight.shape)
            chosen = (cut.u[:q].T @ cut.v[:, :q].T).abs().flatten().topk(count).indices
        chosen = chosen.sort().values
        return torch.stack([chosen // k, chosen % k]).to(site.weight)

    def _check(self) -> None:
        super()._check()
        choice("pattern", self.pattern, ("plain", "banded", "random", "top_k"))
        choice("init", self.init, ("zero", "reference"))
        require(type(self.width) is int and self.width >= 0, "width has to be a whole number of at least 0", self.width)
        require(self.pattern != "plain" or not self.width, "width needs another pattern than 'plain'", self.width)
