"""CorDA as its paper has it (arXiv:2406.05223): the cut of W C, C the inputs' second moment, leaves W. Dense float64.

The code doubles the damping until the explicit inverse in float32 is exact enough, and divides a sample's inputs by
their maximum. A factor c on C changes no product L R, only its balance: L grows by sqrt c (by its fourth root at power
.5), and R shrinks as much. `power=0.5` is not the paper's: the cut of W C^(1/2) is the best for the outputs' error.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # alpha = r


def start(
    W: Tensor, r: int, s: float, C: Tensor, part: str = "top", power: float = 1.0, damping: float = 0.01
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W - s L R, and L = U sqrt(S / s), R = sqrt(S / s) V^T C^-1 of r triples: the top (IPA) or the bottom (KPA)."""
    damped = C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    values, vectors = torch.linalg.eigh(damped)
    oriented = damped if power == 1 else vectors @ torch.diag(values**power) @ vectors.T
    U, S, Vh = torch.linalg.svd(W @ oriented, full_matrices=False)
    kept = slice(None, r) if part == "top" else slice(len(S) - r, None)
    root = torch.diag((S[kept] / s).sqrt())
    L, R = U[:, kept] @ root, root @ Vh[kept] @ torch.linalg.inv(oriented)
    return W - s * L @ R, L, torch.ones(r, dtype=W.dtype), R


def forward(x: Tensor, base: Tensor, L: Tensor, core: Tensor, R: Tensor, s: float) -> Tensor:
    """(W - s L_0 R_0) x + s L R x; the core stays I."""
    K = torch.diag(core) if core.ndim == 1 else core
    return x @ base.T + s * x @ R.T @ K.T @ L.T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
