"""LoRA-XS as its paper (arXiv:2405.17604) and its reference code have it: dense float64.

The paper has the singular values on the output's side, A = U_r S_r; the code decomposes W^T, which has them on the
input's. Only the r x r core learns, so the two train differently. The code decomposes by a randomized method.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # alpha = r in the paper's runs of mathematics


def start(
    W: Tensor, r: int, s: float, sigma: str = "input", std: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W itself, U_r and S_r V_r^T ("input"), or U_r S_r and V_r^T ("output"), and a core of N(0, std^2)."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    L, R = U[:, :r], Vh[:r]
    if sigma == "input":
        R = torch.diag(S[:r]) @ R
    else:
        L = L @ torch.diag(S[:r])
    generator = torch.Generator().manual_seed(0)
    return W, L, std * torch.randn(r, r, dtype=W.dtype, generator=generator), R


def forward(x: Tensor, base: Tensor, L: Tensor, K: Tensor, R: Tensor, s: float) -> Tensor:
    """W x + s L K R x."""
    C = torch.diag(K) if K.ndim == 1 else K
    return x @ base.T + s * x @ R.T @ C.T @ L.T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
