"""What an algorithm answers, and how far from the truth it is."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .operator import Operator

ORTHONORMAL = 1e-6


class Triples(NamedTuple):
    """k singular triples of a tall matrix A (m, n), in float64, vectors as rows, by descending singular value."""

    u: Tensor  # (k, m)
    s: Tensor  # (k,)
    v: Tensor  # (k, n)


def triples(op: Operator, basis: Tensor) -> Triples:
    """The triples that an orthonormal basis (k, n) of right singular vectors gives, by Rayleigh-Ritz in float64.

    The left vectors come from a QR factorisation of A V^T, not from a division by s: they are orthonormal whatever s.
    A v = s u then holds by construction.
    """
    q, r = torch.linalg.qr(op.up(basis.double()).T)
    u, s, turn = torch.linalg.svd(r)
    return Triples((q @ u).T, s, turn @ basis)


def error(op: Operator, found: Triples) -> float:
    """max |A^T u - s v| over the triples, relative to the largest s among them (or to 1e-9 |A|, if that is larger).

    Infinite if the vectors of a side are not orthonormal to ORTHONORMAL.
    """
    if max(_deviation(found.u), _deviation(found.v)) > ORTHONORMAL:
        return math.inf
    residual = (op.down(found.u) - found.s[:, None] * found.v).norm(dim=1).max().item()
    return residual / max(found.s[0].item(), op.floor)


def _deviation(x: Tensor) -> float:
    products = x @ x.T
    products.diagonal().sub_(1)
    return products.abs().max().item()
