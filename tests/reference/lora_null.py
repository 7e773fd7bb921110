"""LoRA-Null as its paper has it (arXiv:2503.02659): what W does to the inputs' null space leaves W. Dense float64.

The paper decomposes the inputs X; C = X^T X has the same last directions. The code's v1 trains both factors, v2 the
left one alone: they start alike. Where C has more than r zero eigenvalues, which r, and so the start, is arbitrary.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # alpha = r in the paper's runs


def start(W: Tensor, r: int, s: float, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W - W Q Q^T, Q the r last eigenvectors of C, and L = U sqrt(S / s), R = sqrt(S / s) V^T of W Q Q^T."""
    _, vectors = torch.linalg.eigh(C)
    Q = vectors[:, :r]  # eigh's values ascend
    U, S, Vh = torch.linalg.svd(W @ Q @ Q.T, full_matrices=False)
    root = torch.diag((S[:r] / s).sqrt())
    L, R = U[:, :r] @ root, root @ Vh[:r]
    return W - s * L @ R, L, torch.ones(r, dtype=W.dtype), R


def forward(x: Tensor, base: Tensor, L: Tensor, core: Tensor, R: Tensor, s: float) -> Tensor:
    """(W - W Q Q^T) x + s L R x; the core stays I."""
    K = torch.diag(core) if core.ndim == 1 else core
    return x @ base.T + s * x @ R.T @ K.T @ L.T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
