"""The smallest triples, given about the inverse of A^T A."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Inverse, extension, orthonormal
from .operator import Operator

CYCLES = 12


def davidson(op: Operator, inverse: Inverse, start: Tensor, k: int, block: int, tolerance: float) -> Tensor:
    """A basis (k, n) of the k trailing right singular vectors, by block Davidson (Morgan and Scott 1986).

    Residuals and Rayleigh-Ritz are in float64 on skinny matrices, so the answer is as exact as float64 allows while
    `inverse`, which turns a residual into a direction to add, needs to be right to a few digits only. Cost: 8 m n block
    a cycle and one call of `inverse`. Error: the Ritz residual relative to the largest of the k values, below
    `tolerance`, or what stands after CYCLES or when three cycles have gained less than a digit.
    """
    basis = orthonormal(start.double())
    image = op.up(basis)
    room = max(6 * block, len(basis) + block)
    errors: list[float] = []
    for _ in range(CYCLES):
        values, vectors = torch.linalg.eigh(image @ image.T)
        vectors, s = vectors.T, values[:block].clamp_min(0).sqrt()
        v, y = vectors[:block] @ basis, vectors[:block] @ image
        residual = op.down(y) - s[:, None] ** 2 * v
        size = residual.norm(dim=1)
        error = (size[:k] / s[:k].clamp_min(1e-14 * op.norm)).max().item() / max(s[k - 1].item(), 1e-7 * op.norm)
        errors.append(error)
        stuck = len(errors) > 3 and error > errors[-4] / 10
        if error <= tolerance or stuck or len(basis) + len(v) > op.n:
            break
        if len(basis) + block > room:
            basis, image = vectors[: 2 * block] @ basis, vectors[: 2 * block] @ image
        new = extension(inverse((residual / size.clamp_min(1e-300)[:, None]).float()).double(), basis)
        basis, image = torch.cat([basis, new]), torch.cat([image, op.up(new)])
    return v[:k].flip(0)
