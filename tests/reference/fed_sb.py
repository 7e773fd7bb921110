"""Fed-SB as its paper has it (arXiv:2502.15436): LoRA-SB on clients that share L and R, whose cores alone are averaged.

mean(L K_i R) = L mean(K_i) R, since the product is linear in K: no client's update is lost, whatever the rank.
Averaging both factors of LoRA is not exact: mean(L_i) mean(R_i) is not mean(L_i R_i). Dense float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # alpha = r, as LoRA-SB


def start(
    W: Tensor, r: int, s: float, gradients: list[Tensor], eta: float = 1e-4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LoRA-SB's, of the mean of the clients' mean gradients: every client starts from the same."""
    G = torch.stack(gradients).mean(0)
    U, S, Vh = torch.linalg.svd(-eta * torch.sign(G), full_matrices=False)
    return W, U[:, :r], torch.diag(S[:r]) / s, Vh[:r]


def average(cores: list[Tensor]) -> Tensor:
    """What the server sends back: each client counts once."""
    return sum(cores[1:], cores[0]) / len(cores)


def deviation(left: Tensor, cores: list[Tensor], right: Tensor) -> float:
    """|mean(L K_i R) - L mean(K_i) R| over |mean(L K_i R)|: rounding."""
    exact = sum((left @ core @ right for core in cores[1:]), left @ cores[0] @ right) / len(cores)
    return ((exact - left @ average(cores) @ right).norm() / exact.norm()).item()


def forward(x: Tensor, base: Tensor, L: Tensor, K: Tensor, R: Tensor, s: float) -> Tensor:
    """W x + s L K R x, of a client or, with the mean core, of the server."""
    C = torch.diag(K) if K.ndim == 1 else K
    return x @ base.T + s * x @ R.T @ C.T @ L.T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
