"""What a weight has to be, and how its norm is brought to where squares of it hold."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from .spectrum import Spectrum

End = Literal["top", "bottom"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SAFE = (1e-10, 1e10)  # norms outside are brought to about one: their squares would leave float32


def check(w: Tensor, k: int, end: str) -> None:
    """ValueError for what cannot be decomposed. NaN and infinity show later, in the norm."""
    if w.ndim != 2 or w.dtype not in DTYPES or w.layout != torch.strided or 0 in w.shape:
        raise ValueError(f"`w` has to be a matrix of floating point. Found {w.dtype} of shape {tuple(w.shape)}.")
    if w.is_meta:
        raise ValueError("`w` has to hold values. Found a tensor on the meta device: load the weight first.")
    if not isinstance(k, Integral):
        raise ValueError(f"The rank has to be a whole number. Found {k!r}.")
    if not 0 <= k <= min(w.shape):
        raise ValueError(f"The rank has to be 0 <= k <= min{tuple(w.shape)} = {min(w.shape)}. Found {k}.")
    if end not in ("top", "bottom"):
        raise ValueError(f"`end` has to be 'top' or 'bottom'. Found {end!r}.")


def scaled(w: Tensor) -> tuple[Tensor, int]:
    """The weight times a power of two that brings its norm to about one, if it is tiny or huge; and the exponent."""
    norm = torch.linalg.vector_norm(w).item()  # one pass: NaN, infinite entries and overflow all show in it
    if SAFE[0] < norm < SAFE[1]:
        return w, 0
    if bad := int((~torch.isfinite(w)).sum()):
        raise ValueError(f"`w` has to be finite. Found {bad} NaN or infinite entries.")
    largest = w.abs().max().item()
    if largest == 0:
        return w, 0
    exponent = math.frexp(largest)[1]
    return torch.ldexp(w.double(), torch.tensor(-exponent, device=w.device)), exponent


def of_zero(w: Tensor, k: int) -> Spectrum:
    """The triples of a zero matrix."""
    m, n = w.shape
    unit = torch.eye(max(m, n), k, dtype=torch.float64, device=w.device)
    return Spectrum(unit[:m], unit.new_zeros(k), unit[:n].T)
