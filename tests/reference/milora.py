"""MiLoRA as its paper has it (arXiv:2406.09044): PiSSA's form at the other end of the spectrum. Dense float64."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # alpha = r in the paper's runs


def start(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The principal part, and B = U sqrt(S / s), A = sqrt(S / s) V^T of the r smallest triples; the core is I."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    keep = min(W.shape) - r
    principal = U[:, :keep] @ torch.diag(S[:keep]) @ Vh[:keep]
    root = torch.diag((S[keep:] / s).sqrt())
    return principal, U[:, keep:] @ root, torch.ones(r, dtype=W.dtype), root @ Vh[keep:]


def forward(x: Tensor, base: Tensor, B: Tensor, core: Tensor, A: Tensor, s: float) -> Tensor:
    """W_p x + s B A x."""
    return x @ base.T + s * x @ A.T @ B.T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
