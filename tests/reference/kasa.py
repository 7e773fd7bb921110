"""KaSA as its paper (arXiv:2412.06071, eq. 9-12) and its reference code have it: dense float64, nothing saved."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 2.0  # alpha = 2r in all of the paper's runs


def start(
    W: Tensor, r: int, s: float, truncation: int | None = None, reference_truncation: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The truncated weight, and L = 0, d ~ N(0, 1), R ~ Kaiming uniform (a = sqrt 5)."""
    m, n = W.shape
    t = r if truncation is None else truncation
    keep = n - t if reference_truncation else min(m, n) - t
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    base = U[:, :keep] @ torch.diag(S[:keep]) @ Vh[:keep]
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(r, dtype=W.dtype, generator=generator)
    R = (2 * torch.rand(r, n, dtype=W.dtype, generator=generator) - 1) / n**0.5
    return base, torch.zeros(m, r, dtype=W.dtype), d, R


def forward(
    x: Tensor, base: Tensor, L: Tensor, d: Tensor, R: Tensor, s: float, dropped: Tensor | None = None
) -> Tensor:
    """W_t x + s L diag(d) R drop(x)."""
    dropped = x if dropped is None else dropped
    return x @ base.T + s * dropped @ R.T @ torch.diag(d).T @ L.T


def regulariser(
    layers: list[tuple[Tensor, Tensor, Tensor]], beta: float, gamma: float, form: str, reduction: str
) -> Tensor:
    """beta |d|^2 + gamma (...) over the layers; the norms are not squared."""
    total = torch.zeros((), dtype=torch.float64)
    for L, d, R in layers:
        left, right = (L.T @ L, R @ R.T) if form == "paper" else (L @ L.T, R.T @ R)
        orthogonal = _norm(left - torch.eye(len(left))) + _norm(right - torch.eye(len(right)))
        total = total + beta * (d**2).sum() + gamma * orthogonal
    return total / len(layers) if reduction == "mean" else total


def _norm(matrix: Tensor) -> Tensor:
    return (matrix**2).sum().sqrt()
