"""Distance of a factor from having orthonormal columns or rows, as the papers' regularisers measure it."""

from __future__ import annotations

import torch
from torch import Tensor

# The norm has no gradient at zero: near it, rounding noise would be pulled at full strength. Smoothed below 1e-5.
_SMOOTHING = 1e-10


def from_orthonormal(gram: Tensor, missing: int = 0) -> Tensor:
    """`|gram - I|_F` for a (k, k) Gram matrix, or for the larger one of the same factor.

    The non-zero eigenvalues of A^T A and A A^T are the same, so `|A^T A - I_n|^2 = |A A^T - I_k|^2 + (n - k)`: with
    `missing = n - k` the large Gram matrix need not be formed.
    """
    off = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (off.square().sum() + missing + _SMOOTHING).sqrt()
