"""A symmetric matrix kept as its lower triangle."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

BLOCKS = 16  # of rows: (1 + 1/16) / 2 of the matrix is kept, and of a product's operations done
SMALL = 512  # a smaller matrix is one block: its products are over before they are worth dividing


class Triangle:
    """An (n, n) symmetric matrix in float64, at first zero, kept by blocks of rows up to their end at the diagonal.

    Memory: about 4 n^2 bytes, half of the matrix; adding X^T X of T rows costs about T n^2 operations, half as well.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral.triangle import Triangle
        >>> triangle = Triangle(2)
        >>> triangle.add_product(torch.tensor([[1.0, 2.0]]), 3.0)
        >>> triangle.dense().tolist()
        [[3.0, 6.0], [6.0, 12.0]]
        >>> triangle.packed().tolist()
        [3.0, 6.0, 12.0]
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.n, self.edges = n, _edges(n)
        self.blocks = [
            torch.zeros(high - low, high, dtype=torch.float64, device=device) for low, high in pairwise(self.edges)
        ]

    def add_product(self, x: Tensor, factor: float) -> None:
        """Adds factor X^T X of x (T, n), multiplied in the dtype of x and where x is."""
        for block, low, high in self._parts():
            block.add_((x[:, low:high].T @ x[:, :high]).to(block.device), alpha=factor)

    def add_outer(self, v: Tensor, factor: float) -> None:
        """Adds factor v v^T of v (n,)."""
        for block, low, high in self._parts():
            block.addr_(v[low:high], v[:high], alpha=factor)

    def add(self, other: Triangle) -> None:
        """Adds another of the same size."""
        for block, more in zip(self.blocks, other.blocks, strict=True):
            block.add_(more.to(block.device))

    def dense(self) -> Tensor:
        """The matrix itself, (n, n), exactly symmetric."""
        out = self.blocks[0].new_empty(self.n, self.n)
        for block, low, high in self._parts():
            out[low:high, :low], out[:low, low:high] = block[:, :low], block[:, :low].T
            square = block[:, low:]
            out[low:high, low:high] = square.tril() + square.tril(-1).T
        return out

    def packed(self) -> Tensor:
        """The lower triangle row after row, (n (n + 1) / 2,), on the CPU."""
        return torch.cat([block[i, : low + i + 1] for block, low, _ in self._on_cpu() for i in range(len(block))])

    def unpack(self, packed: Tensor) -> None:
        """Takes the values of `packed`."""
        start = 0
        for block, low, _ in self._parts():
            for i in range(len(block)):
                block[i, : low + i + 1] = packed[start : start + low + i + 1]
                start += low + i + 1

    def _parts(self) -> list[tuple[Tensor, int, int]]:
        return [(block, low, high) for block, (low, high) in zip(self.blocks, pairwise(self.edges), strict=True)]

    def _on_cpu(self) -> list[tuple[Tensor, int, int]]:
        return [(block.cpu(), low, high) for block, low, high in self._parts()]

    def __repr__(self) -> str:
        return f"Triangle({self.n})"


def size(n: int) -> int:
    """Bytes of a `Triangle` in memory."""
    return sum(8 * (high - low) * high for low, high in pairwise(_edges(n)))


def _edges(n: int) -> list[int]:
    count = BLOCKS if n >= SMALL else 1
    return [n * i // count for i in range(count + 1)]
