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
    """(1 - s) W, and all min(m, n) triples: r is ignored."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    diagonal = core(raw(len(S), form), S, form)
    return W - s * U @ torch.diag(diagonal) @ Vh, U, diagonal, Vh


def raw(k: int, form: str) -> Tensor:
    """What learns, at its start: z = 1, or p = .1."""
    return torch.full((k,), {"plain": 1.0, "gate": 0.1}[form], dtype=torch.float64)


def core(raw: Tensor, S: Tensor, form: str, max_mult: float = 1.0) -> Tensor:
    """S z, or S z (sum S / sum S z) with z = max_mult sigmoid(p)."""
    if form == "plain":
        return S * raw
    z = max_mult / (1 + torch.exp(-raw))
    return S * z * (S.sum() / (S * z).sum())


def forward(x: Tensor, base: Tensor, U: Tensor, core: Tensor, Vh: Tensor, s: float) -> Tensor:
    """(W - s U S V^T) x + s U core V^T x."""
    C = torch.diag(core) if core.ndim == 1 else core
    return x @ (base + s * U @ C @ Vh).T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """None here: the paper's optional KL term is of the model's outputs, not of the adapter."""
    return torch.zeros((), dtype=torch.float64)
