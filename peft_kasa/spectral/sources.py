"""Where decompositions come from other than the weight alone: the weight times a covariance, slices, gradients."""

from __future__ import annotations

import logging
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .covariance import Cut
from .engine import End
from .lowrank import LowRank
from .refine import refined
from .spectrum import Spectrum

Step: TypeAlias = Literal["sign", "plain"]
logger = logging.getLogger(__name__)


def damped(c: Tensor, share: float = 0.01) -> Tensor:
    """`c + share * mean(diag c) * I` in float64, (n, n): CorDA's damping (arXiv:2406.05223).

    CorDA doubles the share until its inverse of C is accurate; `oriented` takes no inverse.

    Raises:
        ValueError: c is not square, or not finite; share is below 0.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral.sources import damped
        >>> damped(torch.diag(torch.tensor([3.0, 1.0])), 0.5).diagonal().tolist()
        [4.0, 2.0]
    """
    _check("c", c, (c.shape[-1],) * 2 if c.ndim else None)
    if not 0 <= share < float("inf"):
        raise ValueError(f"`share` has to be a finite number of at least 0. Found {share}.")
    wide = _wide(c)
    return wide + torch.diag(share * wide.diagonal().mean().expand(len(wide)))


@torch.no_grad()
def powered(c: Tensor, power: float) -> Tensor:
    """C^power of a symmetric matrix (n, n) without negative eigenvalues, in float64. `oriented` by C^(1/2) instead of C
    keeps what the outputs miss smallest: |W X - W' X| is |(W - W') C^(1/2)| in the Frobenius norm.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral.sources import powered
        >>> powered(torch.diag(torch.tensor([9.0, 4.0])), 0.5).diagonal().tolist()
        [3.0, 2.0]
    """
    _check("c", c, (c.shape[-1],) * 2 if c.ndim else None)
    if power == 1:
        return _wide(c)
    values, vectors = torch.linalg.eigh(_wide(c))
    return vectors * values.clamp_min(0) ** power @ vectors.T


@torch.no_grad()
def oriented(w: Tensor, c: Tensor, k: int, end: End, engine: Cut) -> LowRank:
    """The k largest or smallest triples of W C = U S V^T, taken back to W: U_k, S_k and V_k^T C^-1 (CorDA).

    V^T C^-1 = S^-1 U^T W, so no inverse of C is taken (arXiv:2406.05223 takes it, and damps C for it), and the product
    of the three factors is U_k U_k^T W. The smallest triples are the largest of the inverse of W C's triangular factor:
    the singular values of W C span 1e8, and a cut that is accurate beside the first of them says little of the last.

    Where W C is rank deficient (as C may be), S is floored: at eps max(m, n) |W C|, with the eps of float64, or at 1 if
    W C = 0. So all is finite; the product is U_k U_k^T W still, with any basis of what W C leaves out. The smallest
    triples then take a full float64 SVD, which is slow.

    Args:
        w: (m, n), the weight.
        c: (n, n), the covariance of its inputs, in any scale, `damped` or not. The product of the factors does not
            depend on the scale, core and right do.
        k: 0 <= k <= min(m, n).
        end: "top" (CorDA's instruction-previewed adaptation) or "bottom" (its knowledge-preserved adaptation).
        engine: an `Engine`. Its answer is refined in float64, so its precision and tolerance move the time alone: the
            product's relative error was at most 4e-10 (n up to 2048, inputs like a language model's).

    Returns:
        left = U_k (m, k), core = S_k (k,) descending, right = S_k^-1 U_k^T W (k, n), in float64; the entry of largest
        magnitude in each column of left is positive. On the weight's device, on the CPU for one on MPS.

    Raises:
        ValueError: a shape that does not fit, NaN or infinity, a rank out of range.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral import Engine
        >>> from peft_kasa.spectral.sources import oriented
        >>> w, c = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([1.0, 1.0, 10.0]))
        >>> oriented(w, c, 1, "top", Engine()).dense().diagonal().tolist()
        [0.0, 0.0, 1.0]
    """
    _check("w", w)
    _check("c", c, (w.shape[1], w.shape[1]))
    _check_rank(k, w)
    wide = _wide(w)
    product = wide @ _wide(c).to(wide.device)
    norm = product.norm()
    if end == "bottom":
        u, s = _bottom(product, k, engine)
    else:
        u, s = refined(product, engine(product, k, end).u.double())
    s = s.clamp_min(torch.where(norm > 0, torch.finfo(norm.dtype).eps * max(w.shape) * norm, 1.0))
    return Spectrum(u, s, u.T @ wide / s[:, None]).signed().split()


def _bottom(a: Tensor, k: int, engine: Cut) -> tuple[Tensor, Tensor]:
    """Left vectors (m, k) and singular values of the k smallest triples of a float64 matrix."""
    m, n = a.shape
    norm = a.norm()
    q, r = torch.linalg.qr(a) if m >= n else torch.linalg.qr(a.T, mode="r")
    inverse = torch.linalg.solve_triangular(r / norm, torch.eye(len(r), dtype=a.dtype, device=a.device), upper=True)
    if not inverse.norm() * torch.finfo(a.dtype).eps * max(m, n) < 1:  # too large, or NaN
        logger.info("W C is rank deficient: taking a full float64 SVD")
        u, s, _ = torch.linalg.svd(a, full_matrices=False)
        return u[:, len(s) - k :], s[len(s) - k :]
    inverse = inverse.T if m >= n else inverse  # R^-T of A = Q R has left vectors Q^T U, R^-1 of A = R^T Q^T has U
    u, s = refined(inverse, engine(inverse, k, "top").u.double())
    return (q @ u if m >= n else u).flip(1), norm / s.flip(0)


def slices(w: Tensor, k: int, rcond: float | None = None) -> LowRank:
    """Nystrom's approximation from the first k columns and rows of W: W[:, :k] pinv(W[:k, :k]) W[:k, :].

    It is W itself if W and W[:k, :k] have the same rank. NLoRA and IntTune (arXiv:2502.14482) start from these slices,
    their code with W[:k, :k] itself for a core, which makes no approximation of W.

    Args:
        w: (m, n), floating point, finite.
        k: 0 <= k <= min(m, n).
        rcond: singular values of W[:k, :k] up to this share of its largest count as 0. None: sqrt(k) eps of W's dtype.
            Rounding a matrix to that dtype moves its singular values by up to half of that, so those below may be
            zeros that were rounded; their inverses would be noise.

    Returns:
        left (m, k), core (k, k), right (k, n), in float64: in float32 the core's rounding, times its condition number,
        would be the error. On the weight's device, on the CPU for one on MPS.

    Raises:
        ValueError: not a finite matrix, a rank out of range, rcond outside 0 <= rcond < 1.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral.sources import slices
        >>> w = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0]))
        >>> torch.allclose(slices(w, 1).dense(), w.double())
        True
    """
    _check("w", w)
    _check_rank(k, w)
    if rcond is None:
        rcond = min(k**0.5 * torch.finfo(w.dtype).eps, 0.5)
    if not 0 <= rcond < 1:
        raise ValueError(f"`rcond` has to be 0 <= rcond < 1. Found {rcond}.")
    left, right = _wide(w[:, :k]).clone(), _wide(w[:k]).clone()  # views would hold all of W
    return LowRank(left, torch.linalg.pinv(left[:k], rtol=rcond), right)


class Mean:
    """The mean of a stream of gradients of an (m, n) weight, in float32 on `device`: for LoRA-SB, LoRA-One and LoRA-GA.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral.sources import Mean
        >>> stream = Mean(1, 2)
        >>> for gradient in ([[1.0, 2.0]], [[3.0, -2.0]]):
        ...     stream.update(torch.tensor(gradient))
        >>> stream.matrix().tolist()
        [[2.0, 0.0]]
    """

    def __init__(self, m: int, n: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        with torch.inference_mode(False):
            self.total = torch.zeros(m, n, device=device)

    @torch.no_grad()
    def update(self, gradient: Tensor) -> None:
        """Takes in one gradient (m, n). ValueError for another shape, for NaN or infinity; that leaves no trace."""
        _check("gradient", gradient, tuple(self.total.shape))
        self.total += gradient.to(self.total)
        self.count += 1

    @torch.no_grad()
    def merge(self, other: Mean) -> None:
        """Takes in all that `other` has seen (another worker's stream), as if it had come here."""
        _check("other", other.total, tuple(self.total.shape))
        self.total += other.total.to(self.total)
        self.count += other.count

    def matrix(self) -> Tensor:
        """The mean, (m, n) float32. ValueError if there has been no gradient."""
        if not self.count:
            raise ValueError("A mean needs gradients. Found none.")
        return self.total / self.count


def first_step(gradient: Tensor, kind: Step) -> Tensor:
    """What an optimiser would do to the weight first, at a learning rate of 1: the matrix to decompose. (m, n).

    Args:
        gradient: (m, n), such as `Mean.matrix()`.
        kind: "sign": -sign(G), Adam's first step (LoRA-SB, arXiv:2411.19557). "plain": -G, a step of gradient descent
            (LoRA-One, arXiv:2502.01235). LoRA-GA takes the triples of G itself.

    Raises:
        ValueError: not a finite matrix, another kind.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral import Engine
        >>> from peft_kasa.spectral.sources import first_step
        >>> step = first_step(torch.tensor([[0.5, -2.0], [0.5, -3.0]]), "sign")
        >>> step.tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]
        >>> Engine()(step, 1).s.item()
        2.0
    """
    if not gradient.is_meta:
        _check("gradient", gradient)
    if kind not in ("sign", "plain"):
        raise ValueError(f"`kind` has to be 'sign' or 'plain'. Found {kind!r}.")
    return -gradient.sign() if kind == "sign" else -gradient


def _wide(x: Tensor) -> Tensor:
    """In float64, on its device or, as MPS has no float64, on the CPU."""
    return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def _check(name: str, x: Tensor, shape: tuple[int, ...] | None = None) -> None:
    if x.ndim != 2 or not x.is_floating_point() or 0 in x.shape or x.is_meta:
        where = " on the meta device" if x.is_meta else ""
        raise ValueError(f"`{name}` has to be a matrix of floating point. Found {x.dtype} {tuple(x.shape)}{where}.")
    if shape is not None and x.shape != shape:
        raise ValueError(f"`{name}` has to be of shape {shape}. Found {tuple(x.shape)}.")
    if not torch.isfinite(x).all():
        raise ValueError(f"`{name}` has to be finite. Found {int((~torch.isfinite(x)).sum())} NaN or infinite entries.")


def _check_rank(k: int, w: Tensor) -> None:
    if not 0 <= k <= min(w.shape):
        raise ValueError(f"The rank has to be 0 <= k <= min{tuple(w.shape)} = {min(w.shape)}. Found {k}.")
