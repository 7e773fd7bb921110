"""Second moments of a stream of inputs, and their principal axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .engine import End
from .products import exact_products
from .refine import refined
from .spectrum import Spectrum
from .triangle import Triangle

Cut: TypeAlias = Callable[[Tensor, int, End], Spectrum]  # an Engine, or anything that is called like one

TOKENS = 256  # in one product: its float32 sums stay short, its copies small


class Axes(NamedTuple):
    """k principal axes of a stream of inputs, by descending singular value, in float64.

    Signs are fixed: the entry of largest magnitude in each row of `v` is positive.
    """

    s: Tensor  # (k,), singular values of the stacked inputs X, or of X less its mean; s^2 / count is a variance
    v: Tensor  # (k, n), orthonormal rows
    explained: Tensor  # (k,), the share of each axis in the whole variance (all n make 1), 0 where there is none


class Covariance:
    """X^T X of a stream of inputs, X (tokens, n), in one pass and without X: for CorDA, LoRA-Null and EVA.

    Each batch is centred, multiplied in float32 (float64 inputs in float64) and joined in float64 (Chan, Golub, LeVeque
    1979). So a mean far from zero costs no digits, nor do millions of tokens, and the outcome can be had both centred
    and not. Autocast, TF32 and bf16 products are off in here. One triangle is kept: about 4 n^2 bytes, and n^2
    operations a token.

    Args:
        features: n, the size of the inputs' last dimension.
        device: where the sums are kept. Products are computed where the inputs are.

    Attributes:
        count: the number of tokens, each times its weight.
        mean: (n,) float64.
        triangle: X^T X of the inputs less their mean, (n, n), float64.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral.covariance import Covariance
        >>> stream = Covariance(2)
        >>> stream.update(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> stream.update(torch.tensor([[5.0, 2.0], [9.0, 9.0]]), mask=torch.tensor([True, False]))
        >>> stream.matrix().tolist()
        [[35.0, 22.0], [22.0, 20.0]]
        >>> stream.axes(1, centred=True).explained.item()
        0.75
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        if features < 1:
            raise ValueError(f"`features` has to be at least 1. Found {features}.")
        self.count: float = 0
        with torch.inference_mode(False):  # or only inference mode could write to them
            self.mean = torch.zeros(features, dtype=torch.float64, device=device)
            self.triangle = Triangle(features, device)
        self._found: dict[object, Any] = {}  # axes by what was asked for: modules that share inputs ask alike

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None, weight: float = 1) -> None:
        """Takes in a batch. A batch that raises leaves no trace.

        Args:
            x: (..., n), floating point, finite where the mask is True.
            mask: (...) boolean, True for the tokens that count. None: all.
            weight: each token counts so often. CorDA (arXiv:2406.05223) divides every sequence by its largest entry
                first: the same as a weight of 1 / entry^2.

        Raises:
            ValueError: another shape or dtype, NaN or infinity in x, a weight that is not above 0.
        """
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"`weight` has to be a finite number above 0. Found {weight}.")
        rows = self._rows(x, mask)
        if len(rows) == 0:
            return
        low, high = torch.aminmax(rows)  # NaN if any entry is
        peak = torch.maximum(-low, high).item()
        if not math.isfinite(peak):
            bad = int((~torch.isfinite(rows)).sum())
            raise ValueError(f"Inputs have to be finite. Found {bad} NaN or infinite entries in {tuple(x.shape)}.")
        scale = 2.0 ** max(math.frexp(peak)[1] - 1, -100)  # keeps the squares in range; a power of 2 rounds nothing
        dtype = torch.promote_types(rows.dtype, torch.float32)
        with exact_products(rows.device.type):
            for part in rows.split(TOKENS):
                # The centre is rounded to `dtype`. What that leaves out is of second order: 4e-15 of the mean squared.
                mean = part.mean(0, dtype=torch.float64)
                centred = part.to(dtype).sub(mean.to(dtype)).div_(scale)
                self.triangle.add_product(centred, weight * scale**2)
                self._join(weight * len(part), mean)

    @torch.no_grad()
    def merge(self, other: Covariance) -> None:
        """Takes in all that `other` has seen (another worker's stream), as if it had come here."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"Streams to merge need the same size. Found {len(self.mean)} and {len(other.mean)}.")
        if other.count:
            self.triangle.add(other.triangle)
            self._join(other.count, other.mean)

    def matrix(self, centred: bool = False) -> Tensor:
        """X^T X, (n, n) float64, or that of X less its mean. A sum: divide by `count`, or by sequences, as you need.

        Raises:
            ValueError: no token has been seen.
        """
        if not self.count:
            raise ValueError("A covariance needs inputs. Found none: no token has been seen.")
        scatter = self.triangle.dense()
        return scatter if centred else scatter.addr_(self.mean, self.mean, alpha=self.count)

    @torch.no_grad()
    def axes(self, k: int, engine: Cut | None = None, centred: bool = False) -> Axes:
        """The k leading right singular vectors of the stacked inputs X: EVA's A (arXiv:2410.07170).

        Args:
            k: 0 <= k <= n.
            engine: what decomposes X^T X, an `Engine`; its answer is refined in float64, as X^T X spans the square of
                what X does. For few axes of many features. None: `torch.linalg.eigh` in float64, O(n^3).
            centred: X less its mean, as in a PCA. EVA's code is centred (it runs an incremental PCA).

        Raises:
            ValueError: a rank out of range; no token has been seen.
        """
        n = len(self.mean)
        if not 0 <= k <= n:
            raise ValueError(f"The rank has to be 0 <= k <= n = {n}. Found {k}.")
        if (known := self._found.get((k, engine, centred))) is None:
            known = self._found[(k, engine, centred)] = self._axes(k, engine, centred)
        return known

    def _axes(self, k: int, engine: Cut | None, centred: bool) -> Axes:
        n, moment = len(self.mean), self.matrix(centred)
        if engine is None:
            values, vectors = torch.linalg.eigh(moment)  # ascending
            values, v = values[n - k :].flip(0), vectors[:, n - k :].flip(1).T
        else:
            u, values = refined(moment, engine(moment, k, "top").u.double())
            v = u.T
        values = values.clamp_min(0)  # rounding may leave -1e-16 of the first
        total = moment.diagonal().sum().clamp_min(torch.finfo(torch.float64).tiny)
        return Axes(values.sqrt(), Spectrum(v.T, values, v).signed().v, values / total)

    @torch.no_grad()
    def quietest(self, k: int) -> Tensor:
        """The k right singular vectors of X with the smallest singular values, (k, n) orthonormal rows: LoRA-Null's Q.

        By `torch.linalg.eigh` in float64, O(n^3), the least of all last; signs as in `Axes`.
        """
        n = len(self.mean)
        if not 0 <= k <= n:
            raise ValueError(f"The rank has to be 0 <= k <= n = {n}. Found {k}.")
        if (known := self._found.get(k)) is None:
            vectors = torch.linalg.eigh(self.matrix()).eigenvectors[:, :k].flip(1)  # ascending
            known = self._found[k] = Spectrum(vectors, vectors.new_zeros(k), vectors.T).signed().v
        return known

    def _rows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        n = len(self.mean)
        if x.ndim == 0 or x.shape[-1] != n or not x.is_floating_point() or x.is_meta:
            raise ValueError(f"Inputs have to be floating point of shape (..., {n}). Found {x.dtype} {_place(x)}.")
        rows = x.reshape(-1, n)
        if x.device.type == "mps":  # has no float64
            rows = rows.cpu()
        if mask is None:
            return rows
        if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
            found = f"{mask.dtype} {_place(mask)}"
            raise ValueError(f"`mask` has to be boolean of shape {tuple(x.shape[:-1])}. Found {found}.")
        return rows[mask.reshape(-1).to(rows.device)]

    def _join(self, count: float, mean: Tensor) -> None:
        """Takes in that `count` tokens with this mean have come, whose scatter about it is in the triangle already."""
        shift = mean.to(self.mean.device) - self.mean
        self.triangle.add_outer(shift, self.count * count / (self.count + count))
        self._found.clear()
        self.count += count
        self.mean.add_(shift, alpha=count / self.count)

    def __repr__(self) -> str:
        return f"Covariance({len(self.mean)}, count={self.count:g})"


def _place(x: Tensor) -> str:
    return f"of shape {tuple(x.shape)}{' on the meta device' if x.is_meta else ''}"
