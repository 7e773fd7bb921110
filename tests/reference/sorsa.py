"""SORSA as its paper and its reference code have it (arXiv:2409.00055): dense float64."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # the reference code's, where alpha is not given


def start(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W - s U_r S_r V_r^T, and the r largest triples, not divided by s: the trained part is multiplied by it too."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    residual = W - s * U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
    return residual, U[:, :r], S[:r], Vh[:r]


def forward(x: Tensor, base: Tensor, U: Tensor, S: Tensor, Vh: Tensor, s: float) -> Tensor:
    """W_r x + s U diag(S) V^T x."""
    return x @ base.T + s * x @ Vh.T @ torch.diag(S) @ U.T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], gamma: float, reduction: str) -> Tensor:
    """gamma / 2 (|V^T V - I|_F + |U^T U - I|_F), the norms not squared."""
    total = torch.zeros((), dtype=torch.float64)
    for U, S, Vh in layers:
        identity = torch.eye(len(S), dtype=S.dtype)
        orthogonal = ((Vh @ Vh.T - identity) ** 2).sum().sqrt() + ((U.T @ U - identity) ** 2).sum().sqrt()
        total = total + gamma / 2 * orthogonal
    return total / len(layers) if reduction == "mean" else total
