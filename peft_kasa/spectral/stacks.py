"""Small weights of one shape, many at a time on CUDA, where each alone would cost its launches.

It has run on CPUs only, in tests: no GPU has been at hand in this project so far. `examples/benchmarks/decomposition.py
--cuda` (`on_cuda.py`) would measure it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import rules
from .algorithms.batched import batched, fits
from .products import exact_products
from .spectrum import Spectrum
from .threads import limited
from .weights import SAFE

logger = logging.getLogger(__name__)

LEAST = 4  # weights of one shape that are worth a batch
ENTRIES = 1 << 24  # of a batch's weights: 128 MB in float64, and about three times that in all
_devices = {"cuda"}  # tests add the CPU, where it gains nothing


def groups(weights: Mapping[str, Tensor], k: int, device: str | torch.device | None) -> list[list[str]]:
    """The names to decompose together: small weights that share shape and device, in batches; any other alone."""
    alike: dict[object, list[str]] = {}
    for name, w in weights.items():
        where = torch.device(device or w.device)
        small = min(w.shape) <= rules.SMALL and w.numel() <= rules.THREADED and fits(min(w.shape), k)
        key = (w.shape, where) if small and where.type in _devices else name
        alike.setdefault(key, []).append(name)
    found = []
    for names in alike.values():
        parts = -(-len(names) * weights[names[0]].numel() // ENTRIES) if len(names) >= LEAST else len(names)
        size = -(-len(names) // parts)
        found += [names[start : start + size] for start in range(0, len(names), size)]
    return found


def cuts(weights: Sequence[Tensor], k: int, end: str, tolerance: float, device: torch.device) -> list[Spectrum | None]:
    """The cut of each weight, all of one shape, in float64 with canonical signs.

    None for those that miss the gate, and for zero or infinite ones, or NaN: the engine knows what to do about each.
    """
    m, n = weights[0].shape
    found: list[Spectrum | None] = [None] * len(weights)
    with limited(rules.threads(m, n)), exact_products(device.type):
        a = torch.stack([w.detach().to(device, torch.float64) for w in weights])
        a, scale, places = _usable(a.mT if m < n else a)
        if not places:
            return found
        try:
            (u, s, v), missed = batched(a, k, end, tolerance)
        except torch.linalg.LinAlgError as failure:
            logger.info("%d weights of %s failed together (%s)", len(weights), (m, n), failure)
            return found
        u, v = _signed(v, u) if m < n else _signed(u, v)
        for place, left, values, right, error in zip(places, u, s * scale[:, None], v, missed.tolist(), strict=True):
            if error <= tolerance:
                found[place] = Spectrum(left.T, values, right)
    return found


def _usable(a: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Those of a stack that are neither zero nor NaN, infinite or near float64's limits, over a power of two each that
    brings a tiny or huge norm to about one; these powers; and their places.
    """
    largest = torch.linalg.vector_norm(a, torch.inf, dim=(1, 2))
    kept = (largest > 1e-300) & (largest < 1e300)
    places = kept.nonzero()[:, 0].tolist()
    if len(places) < len(a):
        a, largest = a[kept], largest[kept]
    norm = torch.linalg.vector_norm(a, dim=(1, 2))
    power = largest / torch.frexp(largest).mantissa  # exact, as no rounding is in it
    scale = torch.where((norm > SAFE[0]) & (norm < SAFE[1]), torch.ones_like(power), power)
    return a / scale[:, None, None], scale, places


def _signed(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `Spectrum.signed`, for stacks of vectors as rows."""
    pivot = u.abs().argmax(dim=-1, keepdim=True)
    sign = torch.where(u.gather(-1, pivot) < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, v * sign
