"""The verb: one weight to a cut of its spectrum."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from .spectrum import Spectrum

logger = logging.getLogger(__name__)

End = Literal["top", "bottom"]


class Engine:
    """Computes the top or the bottom k singular triples of a matrix.

    The method is the plain one: the Gram matrix of the smaller side and its eigenvectors in float64, then an SVD of the
    skinny product, on one thread, so that the same weight gives the same bits on one device. It costs
    O(min(m, n)^2 max(m, n)). The answer's residual `|W^T u - s v| / |W|` is measured; above
    `tolerance` (where the condition number squared exceeds float64) a full float64 SVD is taken and this is logged.

    Args:
        tolerance: the largest residual accepted from the fast way, relative to the Frobenius norm of the matrix.

    Example:
        >>> import torch
        >>> from peft_kasa.spectral import Engine
        >>> weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        >>> bottom = Engine()(weight, 1, end="bottom")
        >>> torch.allclose(bottom.s, torch.linalg.svdvals(weight)[-1:])
        True
    """

    def __init__(self, tolerance: float = 1e-9) -> None:
        self.tolerance = tolerance

    @torch.no_grad()
    def __call__(self, w: Tensor, k: int, end: End = "top") -> Spectrum:
        """The k largest (`end="top"`) or smallest (`end="bottom"`) triples of `w`, as float32 on its device.

        Args:
            w: (m, n), floating point, finite, not on the meta device.
            k: 0 <= k <= min(m, n).
            end: which end of the spectrum.

        Raises:
            ValueError: the rule, what was found, and what to do.
        """
        _check(w, k, end)
        device = torch.device("cpu") if w.device.type == "mps" else w.device  # MPS has no float64
        wide = w.to(device, torch.float64)
        with _one_thread():
            cut = _by_gram(wide, k, end)
            if (residual := _residual(wide, cut)) > self.tolerance:
                logger.info("residual %.1e above %.1e: taking a full float64 SVD instead", residual, self.tolerance)
                cut = _by_svd(wide, k, end)
        return Spectrum(*(part.to(w.device, torch.float32) for part in cut.signed()))

    def __repr__(self) -> str:
        return f"Engine(tolerance={self.tolerance:g})"


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK gives other bits with another thread count, and on shared cores its spinning threads cost it minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check(w: Tensor, k: int, end: str) -> None:
    if w.ndim != 2 or not w.is_floating_point() or 0 in w.shape:
        raise ValueError(f"`w` has to be a matrix of floating point. Found {w.dtype} of shape {tuple(w.shape)}.")
    if w.is_meta:
        raise ValueError("`w` has to hold values. Found a tensor on the meta device: load the weight first.")
    if not 0 <= k <= min(w.shape):
        raise ValueError(f"The rank has to be 0 <= k <= min{tuple(w.shape)} = {min(w.shape)}. Found {k}.")
    if end not in ("top", "bottom"):
        raise ValueError(f"`end` has to be 'top' or 'bottom'. Found {end!r}.")
    if not torch.isfinite(w).all():
        raise ValueError(f"`w` has to be finite. Found {int((~torch.isfinite(w)).sum())} NaN or infinite entries.")


def _by_gram(w: Tensor, k: int, end: End) -> Spectrum:
    scale = w.abs().max().clamp_min(torch.finfo(torch.float64).tiny)  # keeps the squares in range
    tall = (w if w.shape[0] >= w.shape[1] else w.T) / scale
    basis = torch.linalg.eigh(tall.T @ tall).eigenvectors  # ascending eigenvalues
    basis = basis[:, :k] if end == "bottom" else basis[:, basis.shape[1] - k :]
    u, s, vt = torch.linalg.svd(tall @ basis, full_matrices=False)
    v = vt @ basis.T
    return Spectrum(u, s * scale, v) if tall.shape == w.shape else Spectrum(v.T, s * scale, u.T)


def _by_svd(w: Tensor, k: int, end: End) -> Spectrum:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    part = slice(0, k) if end == "top" else slice(len(s) - k, len(s))
    return Spectrum(u[:, part], s[part], v[part])


def _residual(w: Tensor, cut: Spectrum) -> float:
    norm = w.norm()
    if norm == 0 or len(cut.s) == 0:
        return 0.0
    back = (w.T @ cut.u - cut.v.T * cut.s).norm()
    forth = (w @ cut.v.T - cut.u * cut.s).norm()
    return (torch.maximum(back, forth) / norm).item()
