"""PiSSA as its paper has it (arXiv:2404.02948, eq. 2-4): dense float64."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # alpha = r in the paper's runs


def start(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The residual, and B = U sqrt(S / s), A = sqrt(S / s) V^T of the r largest triples; the core is I."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = torch.diag((S[:r] / s).sqrt())
    B, A = U[:, :r] @ root, root @ Vh[:r]
    return W - s * B @ A, B, torch.ones(r, dtype=W.dtype), A


def forward(x: Tensor, base: Tensor, B: Tensor, core: Tensor, A: Tensor, s: float) -> Tensor:
    """W_res x + s B A x."""
    return x @ base.T + s * x @ A.T @ B.T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
