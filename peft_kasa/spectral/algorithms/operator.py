"""A weight as the algorithms see it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 1 << 20  # entries of the weight that are widened to float64 at a time: 8 MB
SMALL = 1 << 21  # entries up to which a float64 copy is kept instead: 16 MB
CACHED = 1 << 24  # entries up to which two passes over the weight are as fast as one: 64 MB
PANEL = 1024


class Operator:
    """A matrix turned so that it is tall, A (m, n) with m >= n, multiplied with blocks in the dtype of the block.

    Blocks hold their vectors as rows, (d, n): on a CPU, products in float64 are up to three times faster so. A float64
    block meets the weight in float64, some rows of the weight at a time: no float64 copy of a large weight is held.

    Args:
        w: floating point, any shape (rows, columns); its norm neither tiny nor huge.
    """

    def __init__(self, w: Tensor) -> None:
        self.w = w
        self.turned = w.shape[0] < w.shape[1]
        self.m, self.n = max(w.shape), min(w.shape)
        self.single = w.to(torch.float32)
        self.norm = torch.linalg.vector_norm(self.single).item()
        self.floor = 1e-9 * self.norm  # errors of smaller values are measured against this: float64 ends there
        self._whole = w.dtype == torch.float64 or w.numel() <= SMALL
        rows = max(1, CHUNK // w.shape[1])
        self._double = w.double() if self._whole else w.new_empty(rows, w.shape[1], dtype=torch.float64)

    @property
    def tall(self) -> Tensor:
        """A itself in float32, a view of the weight."""
        return self.single.T if self.turned else self.single

    def up(self, x: Tensor) -> Tensor:
        """A x for each row x: (d, n) -> (d, m)."""
        return self._from_rows(x) if self.turned else self._to_rows(x)

    def down(self, y: Tensor) -> Tensor:
        """A^T y for each row y: (d, m) -> (d, n)."""
        return self._to_rows(y) if self.turned else self._from_rows(y)

    def normal(self, x: Tensor) -> Tensor:
        """A^T A x for each row x, (d, n) float32: by panels where the weight exceeds the caches, so it is read once."""
        if self.w.numel() <= CACHED:
            return self.down(self.up(x))
        out = x.new_zeros(self.n, len(x))
        for rows in self.tall.split(PANEL):
            out.addmm_(rows.T, rows @ x.T)
        return out.T

    def gram(self) -> Tensor:
        """A^T A in float32, (n, n)."""
        return squared(self.tall)

    def _to_rows(self, x: Tensor) -> Tensor:
        """x W^T."""
        if x.dtype == torch.float32:
            return (self.single @ x.T).T
        out, start = x.new_empty(len(x), self.w.shape[0]), 0
        for rows in self._wide():
            out[:, start : start + len(rows)] = x @ rows.T
            start += len(rows)
        return out

    def _from_rows(self, y: Tensor) -> Tensor:
        """y W."""
        if y.dtype == torch.float32:
            return y @ self.single
        out, start = y.new_zeros(len(y), self.w.shape[1]), 0
        for rows in self._wide():
            out.addmm_(y[:, start : start + len(rows)], rows)
            start += len(rows)
        return out

    def _wide(self) -> Iterator[Tensor]:
        """The rows of the weight in float64, some at a time, in one buffer: to fault new memory in takes longer."""
        if self._whole:
            yield self._double
            return
        for rows in self.w.split(len(self._double)):
            yield self._double[: len(rows)].copy_(rows)


def squared(a: Tensor) -> Tensor:
    """A^T A for a matrix (m, n), in its dtype: the lower triangle by blocks, then mirrored, at 9/16 of the cost."""
    n = a.shape[1]
    blocks = 8 if n >= 512 else 1
    edges = [n * i // blocks for i in range(blocks + 1)]
    out = a.new_empty(n, n)
    for low, high in pairwise(edges):
        torch.mm(a[:, low:high].T, a[:, :high], out=out[low:high, :high])
        out[:low, low:high] = out[low:high, :low].T
    return out
