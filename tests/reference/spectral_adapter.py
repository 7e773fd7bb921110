"""Spectral Adapter, additive and by rotation, as its paper and code have them (arXiv:2405.13952): dense float64.

The code's Cayley map is (I - K)(I + K)^-1: the transpose of the one here, which is its value at -A. Both reach the same
matrices, and start at I.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # the paper has no alpha; with one, the triples are not divided by it, but leave the base s times


def start(
    W: Tensor, r: int, s: float, variant: str = "additive", chunk: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W - s U S V^T, and U, S, V^T of the r triples from chunk * r on; for the rotation the core is a full matrix."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    part = slice(chunk * r, (chunk + 1) * r)
    U, S, Vh = U[:, part], S[part], Vh[part]
    diagonal = S if variant == "additive" else torch.diag(S)
    return W - s * U @ torch.diag(S) @ Vh, U, diagonal, Vh


def cayley(A: Tensor) -> Tensor:
    """(I + K)(I - K)^-1 with K = (A - A^T) / 2: orthogonal whatever A is."""
    K = (A - A.T) / 2
    identity = torch.eye(len(A), dtype=A.dtype)
    return (identity + K) @ torch.linalg.inv(identity - K)


def core(A: Tensor, B: Tensor, c: Tensor, S: Tensor) -> Tensor:
    """(U Cayley(A)) diag(S c) (V Cayley(B))^T without its U and V^T; A = B = 0 and c = 1 at the start."""
    return cayley(A) @ torch.diag(S * c) @ cayley(B).T


def forward(x: Tensor, base: Tensor, U: Tensor, S: Tensor, Vh: Tensor, s: float) -> Tensor:
    """base x + s U S V^T x, where U, S, V^T are U_r + dU, S_r + c, (V_r + dV)^T, or S is the rotation's core."""
    C = torch.diag(S) if S.ndim == 1 else S
    return x @ base.T + s * x @ Vh.T @ C.T @ U.T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
