"""Either end, any k, at the price of one eigendecomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import extension, orthonormal
from .operator import Operator

EXTRA = 8
STEPS = 3


def gram(op: Operator, k: int, end: str, tolerance: float) -> Tensor:
    """A basis (k, n) of the leading or trailing right singular vectors, by the Gram matrix's eigenvectors, refined.

    Gram matrix and `eigh` in float32 cost m n^2 and about 9 n^3; their bottom is wrong where the condition exceeds a
    thousand. So one to STEPS Davidson steps follow, with residuals in float64 and the whole eigendecomposition
    E (L - theta)^-1 E^T as the preconditioner: each gains five or six digits.
    """
    rough, eigenvectors = torch.linalg.eigh(op.gram())
    if end == "top":
        rough, eigenvectors = rough.flip(0), eigenvectors.flip(1)
    block = min(k + EXTRA, op.n)
    basis = orthonormal(eigenvectors[:, :block].T.double())
    image = op.up(basis)
    floor = 1e-6 * rough.abs().max()
    for step in range(STEPS + 1):
        values, vectors = torch.linalg.eigh(image @ image.T)
        if end == "top":
            values, vectors = values.flip(0), vectors.flip(1)
        vectors, values = vectors.T[:block], values[:block].clamp_min(0)
        v, y = vectors @ basis, vectors @ image
        residual = op.down(y) - values[:, None] * v
        s = values[:k].sqrt()
        size = residual.norm(dim=1)
        error = (size[:k] / s.clamp_min(1e-14 * op.norm)).max().item() / max(s.max().item(), op.floor)
        if (error <= tolerance and step) or step == STEPS or 2 * block > op.n:  # one step is cheap, and gains digits
            break
        apart = rough - values[:, None].float()
        apart = torch.where(apart.abs() < floor, torch.where(apart < 0, -floor, floor), apart)
        scaled = (residual / size.clamp_min(1e-300)[:, None]).float()
        new = extension(((scaled @ eigenvectors / apart) @ eigenvectors.T).double(), v)
        basis, image = torch.cat([v, new]), torch.cat([y, op.up(new)])
    return v[:k] if end == "top" else v[:k].flip(0)
