"""Either end of many small weights of one shape at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import EXTRA, STEPS
from .triples import ORTHONORMAL, Triples

FLOOR = 1e-9  # as in `Operator`: errors of smaller values are measured against this share of the norm


def fits(n: int, k: int) -> bool:
    """Whether the refinement has room: it doubles the block."""
    return k > 0 and 2 * (k + EXTRA) <= n


def batched(a: Tensor, k: int, end: str, tolerance: float) -> tuple[Triples, Tensor]:
    """k triples of each tall matrix of a stack (b, m, n), float64, and the error of each, (b,), as `error` measures it.

    The algorithm of `gram`, each step one call for the whole stack: Gram matrices and `eigh` in float32, then one to
    STEPS Davidson steps in float64, until all are within `tolerance`. It costs as many operations as `gram` for each;
    but on a GPU a small weight alone costs its hundreds of launches, which are shared here.

    Args:
        a: no matrix of it zero, tiny or huge.
    """
    basis = _basis(a, k, end, tolerance)
    q, r = torch.linalg.qr(a @ basis.mT)
    turn, s, vectors = torch.linalg.svd(r)
    u, v = (q @ turn).mT, vectors @ basis
    residual = (u @ a - s[..., None] * v).norm(dim=-1).amax(-1)
    missed = residual / torch.maximum(s[:, 0], FLOOR * torch.linalg.vector_norm(a, dim=(1, 2)))
    skew = torch.maximum(_deviation(u), _deviation(v))
    return Triples(u, s, v), torch.where(skew <= ORTHONORMAL, missed, torch.inf)


def _basis(a: Tensor, k: int, end: str, tolerance: float) -> Tensor:
    """Bases (b, k, n) of the leading or trailing right singular vectors."""
    rough, eigenvectors = _eigh(_gram(a), end)
    block = k + EXTRA
    norm = torch.linalg.vector_norm(a, dim=(1, 2))[:, None]
    floor = 1e-6 * rough.abs().amax(-1)[:, None, None]
    basis = _orthonormal(eigenvectors[..., :block].mT.double())
    image = basis @ a.mT
    for step in range(STEPS + 1):
        values, vectors = _eigh(image @ image.mT, end)
        vectors, values = vectors[..., :block].mT, values[:, :block, None].clamp_min(0)
        v, y = vectors @ basis, vectors @ image
        residual = y @ a - values * v
        size = residual.norm(dim=-1, keepdim=True)
        s = values[:, :k, 0].sqrt()
        error = (size[:, :k, 0] / torch.maximum(s, 1e-14 * norm)).amax(-1)
        error = error / torch.maximum(s.amax(-1), FLOOR * norm[:, 0])
        if step == STEPS or (step and bool((error <= tolerance).all())):
            break
        apart = rough[:, None] - values.float()
        apart = torch.where(apart.abs() < floor, torch.where(apart < 0, -floor, floor), apart)
        scaled = (residual / size.clamp_min(1e-300)).float()
        new = ((scaled @ eigenvectors / apart) @ eigenvectors.mT).double()
        for _ in range(2):  # the first pass leaves rounding
            new = _orthonormal(new - (new @ v.mT) @ v)
        basis, image = torch.cat([v, new], 1), torch.cat([y, new @ a.mT], 1)
    return v[:, :k]


def _gram(a: Tensor) -> Tensor:
    single = a.float()
    return single.mT @ single


def _eigh(x: Tensor, end: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues (b, n) and eigenvectors as columns, those of the wanted end first."""
    values, vectors = torch.linalg.eigh(x)
    return (values.flip(-1), vectors.flip(-1)) if end == "top" else (values, vectors)


def _orthonormal(x: Tensor) -> Tensor:
    """Orthonormal bases of the rows (b, d, n), by Cholesky QR twice; by Householder's for those where that fails."""
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex(x @ x.mT)
        failed = (info != 0) | ~torch.isfinite(factor).flatten(1).all(1)
        solved = torch.linalg.solve_triangular(factor, x, upper=False)
        if failed.any():
            solved[failed] = torch.linalg.qr(x[failed].mT).Q.mT
        x = solved
    return x


def _deviation(x: Tensor) -> Tensor:
    products = x @ x.mT
    products.diagonal(dim1=1, dim2=2).sub_(1)
    return products.abs().flatten(1).amax(1)
