"""LoRA-SB as its paper has it (arXiv:2411.19557): the start is the best cut of Adam's first step. Dense float64.

The code decomposes by a randomized method, and takes eta from the batches of the gradient's estimate, not of training.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # alpha = r


def start(W: Tensor, r: int, s: float, G: Tensor, eta: float = 1e-6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W itself, and U_r, S_r / s, V_r^T of -eta sign(G), G the mean gradient; the core alone learns, full."""
    U, S, Vh = torch.linalg.svd(-eta * torch.sign(G), full_matrices=False)
    return W, U[:, :r], torch.diag(S[:r]) / s, Vh[:r]


def forward(x: Tensor, base: Tensor, L: Tensor, K: Tensor, R: Tensor, s: float) -> Tensor:
    """W x + s L K R x."""
    C = torch.diag(K) if K.ndim == 1 else K
    return x @ base.T + s * x @ R.T @ C.T @ L.T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
