"""SVFT as its paper has it (arXiv:2405.19597): W + U M V^T, M sparse. Dense float64.

The code differs: it keeps U, S, V in place of W, so a rank below min(m, n) truncates the weight; it multiplies the
values by sigmoid(g), g = 0 at the start; they start at N(0, 2 / nnz), so that the model's output moves at once (here:
`init="code"`); its random pattern may draw an entry twice; its top_k scores U V^T without the modulus (U or V
itself where W is not square). Here the score is how well u_i and v_j align, |u_i . v_j|, which no choice of signs
changes; where W is not square, over their min(m, n) first entries, for want of a better meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 1.0  # the paper has no alpha


def start(
    W: Tensor, r: int | None, s: float, kind: str = "plain", width: int = 0, gate: bool = False, init: str = "zeros"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W itself, and U, M = 0, V^T of the r largest triples (all of them where r is None); or M random."""
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    U, Vh = U[:, :r], Vh[:r]
    k = len(Vh)
    rows, cols = pattern(kind, k, width, U, Vh)
    values = torch.zeros(len(rows), dtype=W.dtype)
    if init == "code":
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(len(rows), dtype=W.dtype, generator=generator) * (2 / len(rows)) ** 0.5
    learnt = torch.cat([values, torch.zeros(1, dtype=W.dtype)]) if gate else values
    return W, U, core(learnt, rows, cols, k, gate), Vh


def entries(k: int, width: int) -> int:
    """How many entries of a (k, k) matrix have |i - j| <= width: the other patterns have as many."""
    width = min(width, k - 1)
    return k * (2 * width + 1) - width * (width + 1)


def pattern(
    kind: str, k: int, width: int = 0, U: Tensor | None = None, Vt: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The rows and columns of what learns in the (k, k) core, row by row; each entry once."""
    if kind == "plain":
        chosen = torch.eye(k, dtype=torch.bool)
    elif kind == "banded":
        index = torch.arange(k)
        chosen = (index[:, None] - index).abs() <= width
    else:
        if kind == "random":
            score = torch.rand(k * k, generator=torch.Generator().manual_seed(seed))
        else:
            assert U is not None
            assert Vt is not None
            q = min(U.shape[0], Vt.shape[1])
            score = (U[:q].T @ Vt[:, :q].T).abs().flatten()
        chosen = torch.zeros(k * k, dtype=torch.bool)
        chosen[score.argsort(descending=True)[: entries(k, width)]] = True
        chosen = chosen.view(k, k)
    rows, cols = chosen.nonzero(as_tuple=True)
    return rows, cols


def core(raw: Tensor, rows: Tensor, cols: Tensor, k: int, gate: bool) -> Tensor:
    """M as a dense matrix; with a gate, raw's last entry is g, and the others are multiplied by sigmoid(g)."""
    values = raw[:-1] / (1 + torch.exp(-raw[-1])) if gate else raw
    return torch.zeros(k, k, dtype=raw.dtype).index_put((rows, cols), values)


def forward(x: Tensor, base: Tensor, U: Tensor, M: Tensor, Vh: Tensor, s: float) -> Tensor:
    """W x + s U M V^T x."""
    C = torch.diag(M) if M.ndim == 1 else M
    return x @ (base + s * U @ C @ Vh).T


def regulariser(layers: list[tuple[Tensor, Tensor, Tensor]], reduction: str) -> Tensor:
    """The paper has none."""
    return torch.zeros((), dtype=torch.float64)
