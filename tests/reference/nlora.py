"""NLoRA, SLoRA and IntTune (all arXiv:2502.14482) as the reference code has them: dense float64.

Nystrom's approximation of W from its first r rows and columns is W[:, :r] pinv(W[:r, :r]) W[:r, :]; the code starts the
core at W[:r, :r] itself and keeps W, so that the model's output moves at once. With `pseudo_inverse` the start is the
approximation, and leaves the base. IntTune starts as NLoRA does; only the core learns.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # alpha = r in the paper's runs


def start(
    W: Tensor, r: int, s: float, variant: str = "nlora", pseudo_inverse: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, or W less s L K R, and slices of W; for SLoRA L = 0, and K, R ~ Kaiming uniform (a = sqrt 5)."""
    m, n = W.shape
    if variant == "slora":
        generator = torch.Generator().manual_seed(0)
        K = (2 * torch.rand(r, r, dtype=W.dtype, generator=generator) - 1) / r**0.5
        R = (2 * torch.rand(r, n, dtype=W.dtype, generator=generator) - 1) / n**0.5
        return W, torch.zeros(m, r, dtype=W.dtype), K, R
    L, K, R = W[:, :r], W[:r, :r], W[:r, :]
    if not pseudo_inverse:
        return W, L, K, R
    K = torch.linalg.pinv(K)
    return W - s * L @ K @ R, L, K, R


def forward(x: Tensor, base: Tensor, L: Tensor, K: Tensor, R: Tensor, s: float) -> Tensor:
    """base x + s L K R x."""
    C = torch.diag(K) if K.ndim == 1 else K
    return x @ base.T + s * x @ R.T @ C.T @ L.T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
