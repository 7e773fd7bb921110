"""Which cuts a piece of code will ask for, found by running it on shapes alone, and their answers given in advance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .spectrum import Spectrum
from .weights import End


class Solver(Protocol):
    """What is called like an `Engine`."""

    def __call__(self, w: Tensor, k: int, end: End = "top", name: str = "") -> Spectrum: ...


class Ask(NamedTuple):
    """One cut of the weight itself."""

    k: int
    end: End


@dataclass(eq=False)
class Outline:
    """An engine for the meta device: its answers have shapes and no values. It notes what it is asked.

    Args:
        weight: the weight, of which cuts are noted in `asked`; of any other matrix, None is.

    Examples:
        >>> import torch
        >>> from peft_kasa.spectral.plan import Outline
        >>> weight = torch.empty(6, 4, device="meta")
        >>> outline = Outline(weight)
        >>> outline(weight, 2, "bottom"), outline(-weight, 1)
        (Spectrum(6 x 2 x 4), Spectrum(6 x 1 x 4))
        >>> outline.asked
        [Ask(k=2, end='bottom'), None]
    """

    weight: Tensor
    asked: list[Ask | None] = field(default_factory=list)

    def __call__(self, w: Tensor, k: int, end: End = "top", name: str = "") -> Spectrum:
        self.asked.append(Ask(k, end) if w is self.weight else None)
        return blank(w, k)


@dataclass(frozen=True, eq=False)
class Given:
    """An engine that has the answer of one matrix already."""

    weight: Tensor
    cut: Spectrum
    ask: Ask
    otherwise: Solver

    def __call__(self, w: Tensor, k: int, end: End = "top", name: str = "") -> Spectrum:
        known = self.ask == (k, end) and w.shape == self.weight.shape and torch.equal(w, self.weight)
        return self.cut if known else self.otherwise(w, k, end, name)


def blank(w: Tensor, k: int) -> Spectrum:
    """A cut without values where `w` is without values, else of zeros."""
    m, n = w.shape
    return Spectrum(w.new_zeros(m, k), w.new_zeros(k), w.new_zeros(k, n))
