"""The smallest triples of a weight that is not square."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import inverse_krylov, orthonormal, random
from .davidson import davidson
from .operator import Operator

EXTRA = 8
ROUGH = 1e-4  # as far as float32 carries at the condition of such weights, and at half the cost


def rectangular(op: Operator, k: int, tolerance: float, generator: torch.Generator) -> Tensor:
    """A basis (k, n) of the k trailing right singular vectors, by a shifted Cholesky factor and block Davidson.

    The bottom of a rectangular spectrum is crowded, and inverse iteration alone crawls. So three inverse steps find the
    smallest eigenvalue of the Gram matrix to a few percent, and a second factor, of G - 0.9 lambda I, sets the k apart.
    Cost: m n^2 for the Gram matrix, n^3 / 3 twice for the factors. Davidson's residuals are those of A itself,
    in float64 in the end.
    """
    block = min(k + EXTRA, op.n)
    gram = op.gram()
    noise = 3e-7 * torch.linalg.matrix_norm(gram).item()  # what float32 leaves uncertain of an eigenvalue
    depth = 3 if 4 * block <= op.n else 1
    basis = inverse_krylov(Inverse(gram, -noise), random(block, op, generator), depth)
    values, vectors = torch.linalg.eigh((basis @ gram @ basis.T).double())
    inverse = Inverse(gram, 0.9 * values[0].item() - noise)
    del gram
    start = orthonormal(vectors.T[:block].float() @ basis)
    rough = davidson(op, inverse, inverse_krylov(inverse, start, depth), k, block, ROUGH)
    return davidson(op, inverse, rough.double(), k, block, tolerance)[:k].flip(0)


class Inverse:
    """x to about (G - shift I)^-1 x for each row x, float32; a shift that is too large is lowered."""

    def __init__(self, gram: Tensor, shift: float) -> None:
        step = max(abs(shift), torch.finfo(torch.float32).tiny) / 4
        self.factor, info = self._factored(gram, shift)
        for _ in range(60):
            if not info:
                return
            shift, step = shift - step, 2 * step
            self.factor, info = self._factored(gram, shift)
        raise torch.linalg.LinAlgError("the Gram matrix has no Cholesky factor")

    @staticmethod
    def _factored(gram: Tensor, shift: float) -> tuple[Tensor, int]:
        shifted = gram.clone()
        shifted.diagonal().sub_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        return factor, int(info.item())

    def __call__(self, x: Tensor) -> Tensor:
        left = torch.linalg.solve_triangular(self.factor, x.T, upper=False)
        return torch.linalg.solve_triangular(self.factor.T, left, upper=True).T
