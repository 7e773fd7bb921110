"""SVF of Transformer^2 as its paper (arXiv:2501.06252) and its reference code have it: dense float64.

The paper trains one factor z a singular value, W' = U diag(S z) V^T: form "plain", z = 1 at the start. The code trains
p with z = max_mult sigmoid(p), and rescales W' by sum S / sum(S z): form "gate", under which max_mult cancels. The code
starts p at .1 + N(0, .01^2); here the noise is left out, so that the start is W exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # the paper has no alpha


def start(W: Tensor, r: int | None, s: float, form: str = "plain") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W - s U S V^T, and U S, z, V^T of the r largest triples (the paper: all of them, where r is None)."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = U[:, :r], S[:r], Vh[:r]
    z = core(raw(len(S), form), S, form)
    return W - s * U @ torch.diag(S * z) @ Vh, U @ torch.diag(S), z, Vh


def raw(k: int, form: str) -> Tensor:
    """What learns, at its start: z = 1, or p = .1."""
    return torch.full((k,), {"plain": 1.0, "gate": 0.1}[form], dtype=torch.float64)


def core(raw: Tensor, S: Tensor, form: str, max_mult: float = 1.0) -> Tensor:
    """z, or z (sum S / sum S z) with z = max_mult sigmoid(p): what the singular values are multiplied by."""
    if form == "plain":
        return raw
    z = max_mult / (1 + torch.exp(-raw))
    return z * (S.sum() / (S * z).sum())


def forward(x: Tensor, base: Tensor, U: Tensor, core: Tensor, Vh: Tensor, s: float) -> Tensor:
    """(W - s U S V^T) x + s U core V^T x."""
    C = torch.diag(core) if core.ndim == 1 else core
    return x @ (base + s * U @ C @ Vh).T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """None here: the paper's optional KL term is of the model's outputs, not of the adapter."""
    return torch.zeros((), dtype=torch.float64)
