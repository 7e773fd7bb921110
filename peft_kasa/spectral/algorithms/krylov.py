"""The largest triples, k up to about n / 10."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocks import orthonormal, random
from .operator import Operator

RESTARTS = 8
EXHAUSTED = 1e-6
GAIN = 3.0  # what a block takes off the residual, about


def krylov(op: Operator, k: int, tolerance: float, generator: torch.Generator) -> Tensor:
    """A basis (k, n) of the k leading right singular vectors, by a thick-restart block Krylov method.

    The space of A^T A grows block by block in float32, orthogonalised in full; its Rayleigh-Ritz pairs are checked now
    and then, and when the space is full it restarts from the leading pairs and the last block (Wu and Simon 2000;
    Baglama and Reichel 2005 for singular values). Cost: 4 m n per vector of the space, which takes about 14 blocks at
    the power-law spectra of language models. Error: the Ritz residual, below `tolerance` relative to the largest value.
    """
    block = block_of(k, op.n)
    keep = -(-k // block) * block + block
    space = min(op.n // block - 1, keep // block + (16 if block <= 32 else 9)) * block  # wide: `eigh` would cost most
    basis, back = (op.single.new_empty(space, op.n) for _ in range(2))
    gram = op.single.new_zeros(space, space)
    new, end = random(block, op, generator), 0
    check = 12 * block  # hardly any earlier space has converged
    for _ in range(RESTARTS):
        while end < space:
            part = slice(end, end + block)
            end += block
            basis[part], back[part] = new, op.normal(new)
            gram[part, :end] = inside = back[part] @ basis[:end].T
            gram[:end, part] = inside.T
            rest = back[part] - inside @ basis[:end]
            if end >= min(check, space):
                values, vectors = _ritz(gram[:end, :end])
                residual = _residual(rest, values, vectors, k)
                if not math.isfinite(residual):
                    raise torch.linalg.LinAlgError("the Krylov space overflowed")
                if residual <= tolerance:
                    return orthonormal((vectors[:k] @ basis[:end]).double())
                check = end + block * math.ceil(math.log(residual / max(tolerance, 1e-16), GAIN))
            spent = rest.norm(dim=1, keepdim=True) <= EXHAUSTED * back[part].norm(dim=1).max()
            if spent.any():  # the space is invariant already, and rounding is all that is left: go on at random
                rest = torch.where(spent, random(block, op, generator), rest)
            new = orthonormal(rest)
            new = orthonormal(new - (new @ basis[:end].T) @ basis[:end])
        for kept in (basis, back):
            kept[:keep] = vectors[:keep] @ kept[:end]
        gram[:keep, :keep] = values[:keep].diag()
        check, end = keep + check - end, keep
    return orthonormal(basis[:k].double())


def block_of(k: int, n: int) -> int:
    """Vectors a block: the narrower, the fewer in all; but wide enough for fast products with a large weight."""
    return min(64, max(16 if n < 1536 else 24, -(-k // 8) * 8))


def _ritz(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0), vectors.T.flip(0)


def _residual(rest: Tensor, values: Tensor, vectors: Tensor, k: int) -> float:
    """Largest |A^T u - s v| over the largest s: by the Krylov relation it lies in what the last block left over."""
    s = values.clamp_min(0).sqrt()
    left = (vectors[:k, -len(rest) :] @ rest).norm(dim=1)
    return (left / s[:k].clamp_min(1e-6 * s[0])).max().item() / max(s[0].item(), 1e-30)
