"""A symmetric matrix kept as its lower triangle."""

from __future__ import annotations

import pytest
import torch

from peft_kasa.spectral.triangle import SMALL, Triangle, size

each_size = pytest.mark.parametrize("n", [1, 7, SMALL - 1, SMALL, SMALL + 5])


def filled(n: int, seed: int = 0) -> tuple[Triangle, torch.Tensor]:
    """A triangle, and the matrix that it stands for."""
    x = torch.randn(40, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    triangle = Triangle(n)
    triangle.add_product(x[:30], 2.0)
    triangle.add_outer(x[30], -0.5)
    return triangle, 2 * x[:30].T @ x[:30] - 0.5 * torch.outer(x[30], x[30])


@each_size
def test_it_is_the_matrix_and_exactly_symmetric(n: int) -> None:
    triangle, dense = filled(n)
    assert torch.allclose(triangle.dense(), dense, rtol=1e-12, atol=1e-10)
    assert torch.equal(triangle.dense(), triangle.dense().T)


@each_size
def test_sums(n: int) -> None:
    (one, dense), (two, more) = filled(n), filled(n, 1)
    one.add(two)
    assert torch.allclose(one.dense(), dense + more, rtol=1e-12, atol=1e-10)


@each_size
def test_packing_loses_no_bit(n: int) -> None:
    triangle, _ = filled(n)
    packed = triangle.packed()
    rows, columns = torch.tril_indices(n, n)
    assert torch.equal(packed, triangle.dense()[rows, columns])
    again = Triangle(n)
    again.unpack(packed)
    assert torch.equal(again.dense(), triangle.dense())


@each_size
def test_memory(n: int) -> None:
    assert size(n) == sum(block.nbytes for block in Triangle(n).blocks)
    assert size(n) <= (0.54 if n >= SMALL else 1) * 8 * n * n
