"""SVFit as its paper's abstract and README have it (arXiv:2409.05926; no public code is known): dense float64."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # the paper has no alpha; with one, the change of the singular values is multiplied by it


def start(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_e = W - s U_r S_r V_r^T, which is frozen as U_r and V_r are, and the r largest singular values, which learn."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    residual = W - s * U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
    return residual, U[:, :r], S[:r], Vh[:r]


def forward(x: Tensor, base: Tensor, U: Tensor, S: Tensor, Vh: Tensor, s: float) -> Tensor:
    """W_e x + s U_r diag(S) V_r^T x."""
    return x @ (base + s * U @ torch.diag(S) @ Vh).T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
