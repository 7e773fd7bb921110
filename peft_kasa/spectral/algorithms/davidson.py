"""The smallest triples, given about the inverse of A^T A."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Inverse, extension, orthonormal
from .operator import Operator

CYCLES = 12


def davidson(op: Operator, inverse: Inverse, start: Tensor, k: int, block: int, tolerance: float) -> Tensor:
    """An orthonormal basis (2 block, n) that begins with the trailing right singular vectors, the smallest first.

    Block Davidson (Morgan and Scott 1986): residuals and Rayleigh-Ritz are in the dtype of `start` on skinny matrices,
    so the answer is as exact as that allows, while `inverse`, which turns a residual into a direction to add, needs to
    be right to a few digits only. Cost: 8 m n block a cycle and one call of `inverse`. Error: the Ritz residual of the
    first k relative to their largest value, below `tolerance`, or what stands after CYCLES or when three cycles have
    gained less than a digit.
    """
    basis = orthonormal(start)
    image = op.up(basis)
    room = max(6 * block, len(basis) + block)
    done, errors = 0, [torch.inf]
    while True:
        wide = image.double()
        values, vectors = torch.linalg.eigh(wide @ wide.T)
        vectors, s = vectors.T.to(basis.dtype), values[:block, None].clamp_min(0).sqrt().to(basis.dtype)
        part = slice(done, block)  # the smallest converge first, and stay so
        v, y, below = vectors[part] @ basis, vectors[part] @ image, s[part]
        residual = op.down(y) - below**2 * v
        size = residual.norm(dim=1, keepdim=True)
        error = (size / below.clamp_min(1e-14 * op.norm))[: k - done, 0] / max(s[k - 1].item(), op.floor)
        errors.append(error.max().item())
        fresh = int((error <= tolerance).long().cumprod(0).sum())
        done += fresh
        stuck = len(errors) > 4 and errors[-1] > errors[-4] / 10
        if done == k or stuck or len(errors) > CYCLES or len(basis) + block > op.n:
            return vectors[: 2 * block] @ basis
        if len(basis) + block > room:
            basis, image = vectors[: 2 * block] @ basis, vectors[: 2 * block] @ image
        directions = inverse((residual / size.clamp_min(torch.finfo(size.dtype).tiny))[fresh:].float())
        new = extension(directions.to(basis.dtype), basis)
        basis, image = torch.cat([basis, new]), torch.cat([image, op.up(new)])
