"""Operations on blocks of vectors, kept as rows (d, n), that the algorithms share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .operator import Operator

Inverse = Callable[[Tensor], Tensor]  # rows (d, n) to about (A^T A - shift)^-1 applied to each, float32


def orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis of the rows, in their dtype: Cholesky QR twice, Householder's where that fails.

    Cholesky QR (Fukaya et al. 2014) costs two small Gram matrices; it needs a condition below 1e8, which float64 Gram
    matrices give it here even for float32 rows.
    """
    for _ in range(2):
        wide = x.double()
        factor, info = torch.linalg.cholesky_ex(wide @ wide.T)
        if info.item() or not torch.isfinite(factor).all():
            return torch.linalg.qr(x.T).Q.T.contiguous()
        x = torch.linalg.solve_triangular(factor, wide, upper=False).to(x.dtype)
    return x


def extension(x: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows for the span of x outside an orthonormal basis: twice, for the first pass leaves rounding."""
    for _ in range(2):
        x = orthonormal(x - (x @ basis.T) @ basis)
    return x


def random(rows: int, op: Operator, generator: torch.Generator) -> Tensor:
    """Orthonormal random rows, float32, drawn on the CPU: the same on every device."""
    return orthonormal(
        torch.randn(rows, op.n, generator=generator, dtype=torch.float32, device="cpu").to(op.single.device)
    )


def inverse_krylov(inverse: Inverse, start: Tensor, depth: int) -> Tensor:
    """An orthonormal basis of the span of M x, M^2 x, ..., M^depth x for the rows x of `start` and M = `inverse`."""
    block = orthonormal(inverse(start))
    basis = block
    for _ in range(depth - 1):
        block = extension(inverse(block), basis)
        basis = torch.cat([basis, block])
    return basis
