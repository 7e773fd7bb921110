"""The smallest triples of a square weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import inverse_krylov, random
from .davidson import davidson
from .operator import Operator

EXTRA = 8  # vectors beyond k: the wider the block, the faster the k converge


def square(op: Operator, k: int, tolerance: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A basis (k, n) of the k trailing right singular vectors, by an LU factor and block Davidson.

    (A^T A)^-1 = A^-1 A^-T by two solves with one LU of A: it works on the condition of A, not on its square. The factor
    costs 2 n^3 / 3 and half of the time; about seven solves follow, because the bottom of a square spectrum is well
    separated. In float32 it fails where the smallest value lies below about 1e-6 of the largest: then take float64.
    """
    block = min(k + EXTRA, op.n)
    inverse = Inverse(op, dtype)
    start = inverse_krylov(inverse, random(block, op, generator), depth=3 if 4 * block <= op.n else 1)
    return davidson(op, inverse, start.double(), k, block, tolerance)[:k].flip(0)


class Inverse:
    """x to about (A^T A)^-1 x for each row x, float32 in and out."""

    def __init__(self, op: Operator, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(op.tall.to(dtype).T)
        pivot = self.lu.diagonal()
        floor = torch.finfo(dtype).eps * op.norm / op.n**0.5  # an exact zero would make everything infinite
        pivot.copy_(torch.where(pivot.abs() < floor, torch.where(pivot < 0, -floor, floor), pivot))

    def __call__(self, x: Tensor) -> Tensor:
        left = torch.linalg.lu_solve(self.lu, self.pivots, x.T.to(self.dtype))
        return torch.linalg.lu_solve(self.lu, self.pivots, left, adjoint=True).T.to(x.dtype)
