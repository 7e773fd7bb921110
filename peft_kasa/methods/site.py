"""What a method sees, one weight at a time, and what it answers: `Site` and `Start`."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..spectral import LowRank, Spectrum
from ..spectral.covariance import Covariance
from ..spectral.plan import Solver, blank
from ..spectral.sources import damped, oriented, powered, slices

Slot: TypeAlias = Literal["left", "core", "right"]
Part: TypeAlias = Literal["top", "bottom", "middle", "random"]
PARTS: dict[Part, str] = {"top": "largest", "bottom": "smallest", "middle": "middle", "random": "random"}
Needs: TypeAlias = Literal["", "inputs", "scaled inputs", "gradients"]


class Site(NamedTuple):
    """One weight as a method sees it. On the meta device nothing has a value and every answer has only its shape."""

    name: str  # the module's name: in every error, and in every seed
    weight: Tensor  # (m, n) float32, dequantised already
    rank: int  # after rank_pattern, at most min(m, n)
    scale: float  # s = alpha / r, after alpha_pattern
    generator: torch.Generator  # seeded by the config's seed and the module's name
    engine: Solver  # on the meta device, an `Outline`
    evidence: Covariance | Tensor | None = None  # what the config's `needs` asked for
    sequences: int = 1  # how many it was gathered from

    def svd(self, k: int, part: Part = "top", of: Tensor | None = None) -> Spectrum:
        """k singular triples of the weight, or of another matrix of its size.

        "top" are the k largest, "bottom" the k smallest, "middle" those in the middle of the spectrum and "random" any
        k (by the site's generator); the last two take a whole decomposition.
        """
        of = self.weight if of is None else of
        if part in ("top", "bottom"):
            return self.engine(of, k, part, self.name)  # type: ignore[arg-type]
        if self.weight.is_meta:
            return blank(of, k)
        size = min(of.shape)
        first = (size - k) // 2
        chosen = (
            torch.arange(first, first + k)
            if part == "middle"
            else torch.randperm(size, generator=self.generator)[:k].sort().values
        ).to(of.device)
        whole = self.engine(of, size, "top", self.name)
        return Spectrum(whole.u[:, chosen], whole.s[chosen], whole.v[chosen])

    def oriented(self, k: int, part: Literal["top", "bottom"], damping: float, power: float) -> LowRank:
        """The k triples of W C^power, C the damped mean moment of the inputs, taken back to W in split form (CorDA)."""
        m, n = self.weight.shape
        if self.weight.is_meta:
            return LowRank(self.zeros(m, k), self.zeros(k), self.zeros(k, n))
        moment = powered(damped(self.inputs.matrix() / self.sequences, damping), power)
        return oriented(self.weight, moment, k, part, self.engine)

    def slices(self, k: int, inverse: bool) -> LowRank:
        """The k first columns W[:, :k] and rows W[:k, :], and as core W[:k, :k] or its pseudo-inverse."""
        if inverse and not self.weight.is_meta:
            return slices(self.weight, k)
        return LowRank(self.weight[:, :k], self.weight[:k, :k], self.weight[:k])

    def axes(self, k: int, part: Literal["top", "bottom"] = "top", centred: bool = False) -> Tensor:
        """The k principal axes of the inputs along which they vary most, or least, as rows (k, n)."""
        if self.weight.is_meta:
            return self.zeros(k, self.weight.shape[1])
        if part == "bottom":
            return self.inputs.quietest(k).to(self.weight)
        return self.inputs.axes(k, self.engine, centred).v.to(self.weight)

    @property
    def inputs(self) -> Covariance:
        """The second moments of the inputs, where the config needs them."""
        if not isinstance(self.evidence, Covariance):
            raise ValueError("statistics of the inputs are needed. Call calibrate(model, data) first.")
        return self.evidence

    @property
    def gradient(self) -> Tensor:
        """The mean gradient (m, n) of the loss by the weight, where the config needs it."""
        if self.weight.is_meta:
            return torch.empty_like(self.weight)  # not the weight itself: see `spectral.plan`
        if not isinstance(self.evidence, Tensor):
            raise ValueError("the gradient of the loss is needed. Call calibrate(model, data) first.")
        if not self.evidence.any():
            raise ValueError(
                "the gradient is zero: the data does not reach this module. Leave it out, or use other data."
            )
        return self.evidence.to(self.weight)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros on the weight's device."""
        return self.weight.new_zeros(shape)

    def ones(self, *shape: int) -> Tensor:
        """Ones on the weight's device."""
        return self.weight.new_ones(shape)

    def normal(self, *shape: int) -> Tensor:
        """Samples of N(0, 1) from the site's own generator, the same on every device."""
        return self._sampled(self.weight.new_empty(0, device="cpu").new_empty(shape).normal_, shape)

    def kaiming_uniform(self, *shape: int) -> Tensor:
        """Samples of U(-b, b) with b = 1 / sqrt(columns): what LoRA and KaSA start their A from."""
        bound = 1 / math.sqrt(shape[-1])
        empty = self.weight.new_empty(0, device="cpu").new_empty(shape)
        return self._sampled(lambda generator: empty.uniform_(-bound, bound, generator=generator), shape)

    def _sampled(self, sample: Any, shape: tuple[int, ...]) -> Tensor:
        if self.weight.is_meta:
            return self.weight.new_empty(shape)
        return sample(generator=self.generator).to(self.weight.device)


class Start(NamedTuple):
    """Where a method begins at one site: y = W x + (scale * trained - displaced) x.

    `displaced` is what leaves the base. `"start"` means scale * trained as it is now, so the model begins exactly at
    the base model. A `LowRank` means the r smallest or largest triples of the weight; where several active adapters
    take such a cut from one weight, it leaves once and the largest wins. `None` means that nothing leaves.
    """

    trained: LowRank  # its core is what learns: `SpectralConfig.core` makes the (k,) or (k, k) core of it
    train: tuple[Slot, ...]
    displaced: LowRank | Literal["start"] | None = None
    fixed: Tensor | None = None  # what `SpectralConfig.core` needs besides what learns: kept, and saved
    through_base: bool = False  # left is W right^T: it is not kept, the base layer is applied instead ("start" only)
