"""A matrix kept as three factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def times(left: Tensor, core: Tensor) -> Tensor:
    """`left @ core` for a core kept as its diagonal (k,) or in full (k, k)."""
    return left * core if core.ndim == 1 else left @ core


class LowRank(NamedTuple):
    """`left @ core @ right`, an (m, n) matrix of rank at most k that is never formed unless `dense` is called.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral import LowRank
        >>> value = LowRank(torch.eye(3, 2), torch.tensor([2.0, 1.0]), torch.eye(2, 4))
        >>> value
        LowRank(3 x 2 x 4)
        >>> torch.equal(value(torch.ones(4)), value.dense() @ torch.ones(4))
        True
        >>> (value - value.scaled(0.5)).dense()[0, 0].item()
        1.0
    """

    left: Tensor  # (m, k)
    core: Tensor  # (k,) a diagonal, or (k, k)
    right: Tensor  # (k, n)

    def __call__(self, x: Tensor) -> Tensor:
        """Applies the matrix to the last dimension: (..., n) -> (..., m)."""
        return times(x @ self.right.T, self.core.T if self.core.ndim == 2 else self.core) @ self.left.T

    @property
    def rank(self) -> int:
        """k, the number of columns of `left`: an upper bound of the matrix's rank."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The matrix itself, (m, n)."""
        return self.up() @ self.right

    def up(self) -> Tensor:
        """`left @ core`, (m, k)."""
        return times(self.left, self.core)

    def balanced(self) -> LowRank:
        """The same matrix, the square roots of its diagonal core, which may not be negative, on both sides."""
        root = self.core.clamp_min(0).sqrt()
        return from_factors(self.left * root, root[:, None] * self.right)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (m, k) and A (k, n) with B @ A equal to the matrix: LoRA's two factors."""
        return self.up(), self.right

    def scaled(self, factor: float) -> LowRank:
        """The matrix times a number."""
        return self._replace(core=self.core * factor)

    def __sub__(self, other: LowRank) -> LowRank:
        """The exact difference. The ranks add, unless both sides share the object `right`."""
        (b, a), (b_other, a_other) = self.factors(), other.factors()
        if a is a_other:
            return from_factors(b - b_other, a)
        return from_factors(torch.cat([b, -b_other], 1), torch.cat([a, a_other]))

    def padded(self, rank: int) -> LowRank:
        """The same matrix, its factors filled up with zeros to a larger k."""
        more = rank - self.rank
        core = F.pad(self.core, (0, more) * self.core.ndim)
        return LowRank(F.pad(self.left, (0, more)), core, F.pad(self.right, (0, 0, 0, more)))

    def truncated(self, rank: int) -> tuple[LowRank, float]:
        """The best approximation of a given rank (Eckart-Young), and its relative error in the Frobenius norm.

        Costs two skinny QRs and one k x k SVD, in float64; the (m, n) matrix is not formed.
        """
        b, a = (factor.double() for factor in self.factors())
        (q_left, r_left), (q_right, r_right) = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        kept = LowRank(q_left @ u[:, :rank], s[:rank], vt[:rank] @ q_right.T)
        total = s.norm()
        error = (s[rank:].norm() / total).item() if total > 0 else 0.0
        return LowRank(*(part.to(self.left.dtype) for part in kept)), error

    def __repr__(self) -> str:
        return f"LowRank({self.left.shape[0]} x {self.rank} x {self.right.shape[1]})"


def from_factors(left: Tensor, right: Tensor) -> LowRank:
    """`left @ right`, (m, k) by (k, n), with a core of ones."""
    return LowRank(left, left.new_ones(left.shape[1]), right)


def total(values: Sequence[LowRank]) -> LowRank:
    """Their exact sum. Ranks add, but a row of `right` that several have, as in a shared frame, is taken once.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral.lowrank import LowRank, total
        >>> one = LowRank(torch.ones(3, 2), torch.ones(2), torch.eye(2, 4))
        >>> total([one, one.scaled(2), LowRank(torch.ones(3, 1), torch.ones(1), torch.ones(1, 4))])
        LowRank(3 x 3 x 4)
    """
    right, place = torch.cat([value.right for value in values]).unique(dim=0, return_inverse=True)
    up = torch.cat([value.up() for value in values], 1)
    return from_factors(up.new_zeros(len(up), len(right)).index_add(1, place, up), right)
