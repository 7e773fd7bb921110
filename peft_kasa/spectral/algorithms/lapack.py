"""The whole decomposition, and the last resort."""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import Operator
from .triples import Triples


def lapack(op: Operator, k: int, end: str, dtype: torch.dtype) -> Triples:
    """The leading or trailing triples, by LAPACK's divide and conquer (gesdd).

    Costs about 4 m n^2 + 22 n^3, and in float64 it is right for whatever float64 can hold.
    """
    source = op.w if dtype == torch.float64 else op.single
    u, s, v = torch.linalg.svd((source.T if op.turned else source).to(dtype), full_matrices=False)
    if dtype != torch.float64:
        u, v = _polished(u.T).T, _polished(v)
    part = slice(0, k) if end == "top" else slice(op.n - k, op.n)
    return Triples(u.T[part].double(), s[part].double(), v[part].double())


def _polished(x: Tensor) -> Tensor:
    """Rows that are orthonormal to 1e-6, made so to rounding by one step of Newton and Schulz."""
    return 1.5 * x - 0.5 * (x @ x.T) @ x
