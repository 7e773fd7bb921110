"""EVA as its paper has it (arXiv:2410.07170): R is the inputs' leading principal directions. Dense float64.

The paper's incremental PCA over batches, stopped when the directions stand still, approximates the eigenvectors here.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # alpha = r, and alpha follows the rank that a module is given


def start(W: Tensor, r: int, s: float, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W itself, L = 0, and R = the r first eigenvectors of C, the inputs' centred scatter; the core is I."""
    _, vectors = torch.linalg.eigh(C)
    R = vectors.flip(1)[:, :r].T  # eigh's values ascend
    return W, torch.zeros(len(W), r, dtype=W.dtype), torch.ones(r, dtype=W.dtype), R


def explained(C: Tensor, count: int) -> list[float]:
    """The shares of the inputs' variance that the `count` first directions explain."""
    values = torch.linalg.eigvalsh(C).flip(0)
    return (values[:count] / values.sum()).tolist()


def redistribute(ratios: dict[str, list[float]], budget: int) -> dict[str, int]:
    """The rank of each module: how many of the `budget` largest ratios, over all modules, are its own."""
    all_ratios = [(ratio, name) for name, given in ratios.items() for ratio in given]
    chosen = sorted(all_ratios, key=lambda pair: -pair[0])[:budget]  # a tie goes to the module that comes first
    return {name: sum(owner == name for _, owner in chosen) for name in ratios}


def forward(x: Tensor, base: Tensor, L: Tensor, core: Tensor, R: Tensor, s: float) -> Tensor:
    """W x + s L R x; the core stays I."""
    K = torch.diag(core) if core.ndim == 1 else core
    return x @ base.T + s * x @ R.T @ K.T @ L.T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
