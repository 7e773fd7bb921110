"""What is measured of updates: alone, beside the weight that they are of, and beside one another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..spectral import Engine, LowRank, Spectrum

NOISE = 1e-6  # of the largest singular value: smaller ones are what float32 rounds off the factors
INTRUDERS = 10  # how many of the largest singular vectors of W + update are looked at
COSINES = (0.5, 0.6, 0.7, 0.8, 0.9)  # below which one of them is none of W's


class Beside(NamedTuple):
    """An update beside the weight W (m, n) that it is of; r is the module's rank.

    Overlaps are mean squared cosines of the principal angles between the update's columns (left) or rows (right) and
    W's r largest (top) or smallest (bottom) singular vectors: 1 where one space holds the other, `chance` for spaces
    that know nothing of each other.
    """

    relative_norm: float  # |update| / |W|, Frobenius
    overlap_top_left: float
    overlap_top_right: float
    overlap_bottom_left: float
    overlap_bottom_right: float
    chance_left: float
    chance_right: float
    intruders: dict[float, int]  # by cosine: see `intruders`


class Between(NamedTuple):
    """Two updates of one weight."""

    cosine: float | None  # of the two as vectors of their entries; None where one is zero
    distance: float  # of the difference, Frobenius
    relative_distance: float | None  # over the first's norm
    overlap_left: float | None  # of the columns' spaces, as in `Beside`
    overlap_right: float | None


def decomposed(value: LowRank) -> Spectrum:
    """The singular triples of an update above the noise, in float64. No (m, n) matrix is formed."""
    up, down = (factor.double() for factor in value.factors())
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    kept = int((s > NOISE * s[0]).sum()) if len(s) else 0
    return Spectrum(q_left @ u[:, :kept], s[:kept], vt[:kept] @ q_right.T)


def beside(update: Spectrum, weight: Tensor, rank: int, name: str) -> Beside:
    """An update, decomposed, beside its weight (m, n). Costs a whole SVD of the weight."""
    engine, size = Engine(precision="float64"), min(weight.shape)
    whole = engine(weight, size, "top", name)
    top, bottom = slice(None, rank), slice(size - rank, None)
    left, right = (max(rank, len(update.s)) / side if len(update.s) else 0.0 for side in weight.shape)
    return Beside(
        (update.s.norm() / whole.s.norm()).nan_to_num(posinf=0.0).item(),
        overlap(update.u, whole.u[:, top]),
        overlap(update.v.T, whole.v[top].T),
        overlap(update.u, whole.u[:, bottom]),
        overlap(update.v.T, whole.v[bottom].T),
        left,
        right,
        intruders(weight.double() + update.split().dense().to(weight.device), whole, name),
    )


def overlap(one: Tensor, other: Tensor) -> float:
    """The mean squared cosine of the principal angles between the spaces of orthonormal columns; 0 where one is empty.

    Examples:
        >>> import torch
        >>> from peft_kasa.report.updates import overlap
        >>> overlap(torch.eye(4, 2), torch.eye(4, 3)), overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
        (1.0, 0.5)
    """
    smaller = min(one.shape[1], other.shape[1])
    return ((one.T @ other.to(one)).square().sum() / smaller).item() if smaller else 0.0


def intruders(tuned: Tensor, whole: Spectrum, name: str) -> dict[float, int]:
    """How many of the 10 largest left singular vectors of W + update have no like among W's (Shuttleworth et al. 2024,
    arXiv:2410.21228): their largest cosine with any of W's is below 0.5, 0.6 ... 0.9.

    Args:
        tuned: W + update, (m, n).
        whole: all singular triples of W.
        name: of the module.
    """
    count = min(INTRUDERS, *tuned.shape)
    found = Engine(precision="float64")(tuned, count, "top", name)
    nearest = (found.u.T @ whole.u.to(found.u)).abs().amax(1)
    return {cosine: int((nearest < cosine).sum()) for cosine in COSINES}


def between(one: LowRank, other: LowRank) -> Between:
    """Two updates (m, n) compared. No (m, n) matrix is formed, and near ones lose no digits."""
    first, second, apart = decomposed(one), decomposed(other), decomposed(_double(one) - _double(other)).s.norm().item()
    norms = (first.s.norm() * second.s.norm()).item()
    inner = (first.u.T @ second.u * (first.v @ second.v.T) * first.s[:, None] * second.s).sum().item()
    empty = norms == 0
    return Between(
        None if empty else inner / norms,
        apart,
        apart / first.s.norm().item() if len(first.s) else None,
        None if empty else overlap(first.u, second.u),
        None if empty else overlap(first.v.T, second.v.T),
    )


def _double(value: LowRank) -> LowRank:
    return LowRank(*(part.double() for part in value))
