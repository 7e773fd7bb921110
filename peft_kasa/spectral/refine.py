"""From rough singular triples to those of a float64 matrix, each accurate beside its own singular value."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

GATE = 1e-10  # of what a triple misses, relative to its singular value
STEPS = 64
ROUNDING = 32 * torch.finfo(torch.float64).eps  # and what float64 leaves, relative to the norm


def refined(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest left singular vectors (m, k) and singular values (k,) of a, near a rough basis of theirs.

    An engine's error is relative to the largest singular value. The k largest of a weight times a covariance can span
    1e5, and the last of them be wrong by all it is. Here `a v - s u` of each triple falls to 1e-10 of its own s, by
    block Krylov steps in float64 on a growing basis: mostly 4 to 16, of 4 m n k operations. A basis of half the space,
    or 64 steps, end in a full SVD instead, and this is logged.

    Args:
        a: (m, n) float64.
        u: (m, k), a basis near the wanted vectors. Better ones need fewer steps.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral.refine import refined
        >>> a = torch.diag(torch.tensor([1e6, 10.0, 1.0, 0.1, 0.01], dtype=torch.float64))
        >>> u, s = refined(a, torch.eye(5, 2).double() + 0.1)
        >>> s.tolist()
        [1000000.0, 10.0]
    """
    k, norm = u.shape[1], a.norm()
    basis = torch.linalg.qr(u).Q.T  # vectors as rows: the products with `a` are up to thirty times faster so
    image = basis @ a
    for _ in range(STEPS):
        turn, s, v = torch.linalg.svd(image, full_matrices=False)
        found, s = turn[:, :k].T @ basis, s[:k]
        rest = v[:k] @ a.T - s[:, None] * found
        size = rest.norm(dim=1)
        missed = size > GATE * s + ROUNDING * norm
        if not missed.any():
            return found.T, s
        new = rest[missed] / size[missed, None]
        if len(basis) + len(new) > max(min(a.shape) // 2, k):
            break
        for _ in range(2):
            new = torch.linalg.qr((new - (new @ basis.T) @ basis).T).Q.T
        basis, image = torch.cat([basis, new]), torch.cat([image, new @ a])
    logger.info("the %d largest triples of %s did not converge: taking a full float64 SVD", k, tuple(a.shape))
    u, s, _ = torch.linalg.svd(a, full_matrices=False)
    return u[:, :k], s[:k]
