"""A `Start` as the tensors that a layer keeps, and those tensors as the factors of its update.

Where the start leaves the base, the layer keeps it frozen (`left0, core0, right0`) and learns zero-initialised
differences (`left, core, right`). Elsewhere `left, core, right` are the values themselves, and a cut of the spectrum
that leaves the base is kept as `cut_left, cut_right`. `fixed` is what the method's core needs besides. Where the left
factor is the base weight times the right one (`through_base`), it is not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..methods.method import SpectralConfig
from ..methods.site import Start
from ..spectral import LowRank
from ..spectral.lowrank import from_factors, times

LEARNABLE = ("left", "core", "right")
CUT = ("cut_left", "cut_right")

Slots = Mapping[str, Tensor]


class Product(NamedTuple):
    """up @ core @ down. A diagonal core is in `up` already, a full one stays apart: (m, k) by (k, k) costs more."""

    up: Tensor  # (m, k)
    core: Tensor | None  # (k, k)
    down: Tensor  # (k, n)

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Applies it to the last dimension, (..., n) -> (..., m), in the dtype of x. Adds that to `onto`, if given."""
        rows = x if onto is None else x.reshape(-1, x.shape[-1])
        hidden = F.linear(rows, self.down.to(x.dtype))
        hidden = hidden if self.core is None else F.linear(hidden, self.core.to(x.dtype))
        up = self.up.to(x.dtype)
        if onto is None:
            return F.linear(hidden, up)
        if onto.dtype == hidden.dtype:
            return torch.addmm(onto.reshape(-1, len(up)), hidden, up.T).view(onto.shape)
        return onto + F.linear(hidden, up).view(onto.shape).to(onto.dtype)

    def folded(self) -> tuple[Tensor, Tensor]:
        """B (m, k) and A (k, n)."""
        return (self.up if self.core is None else self.up @ self.core), self.down

    def lowrank(self) -> LowRank:
        """As a value of the algebra."""
        return from_factors(self.up, self.down) if self.core is None else LowRank(*self)


def pack(start: Start) -> dict[str, Tensor]:
    """The slots of a start, by name; `LEARNABLE` ones that are not in `start.train` stay frozen."""
    slots = start.trained._asdict()
    if start.displaced == "start":
        differences = {name: torch.zeros_like(slots[name]) for name in start.train}
        slots = {f"{name}0": value for name, value in slots.items()} | differences
    elif start.displaced is not None:
        slots = slots | dict(zip(CUT, start.displaced.factors(), strict=True))  # type: ignore[union-attr]
    if start.through_base:
        del slots["left0"]
    return slots if start.fixed is None else slots | {"fixed": start.fixed}


def through_base(slots: Slots) -> bool:
    """Whether the left factor is the base weight times the right one."""
    return "right0" in slots and "left0" not in slots


def value(slots: Slots, config: SpectralConfig) -> LowRank:
    """What learns, as it is now: L, C, R in float32. Not for slots without a left factor."""
    return LowRank(_now(slots, "left"), _core(_now(slots, "core"), slots, config), _now(slots, "right"))


def update(slots: Slots, config: SpectralConfig, scale: float) -> Product:
    """s L C R minus the start (where it left the base); a cut is not in it. With `through_base`, an (n, n) product that
    the base weight is yet to be applied to.

    The difference is telescoped: with B = s L C and B0 = s L0 C0 it is (B - B0) R0 + B dR, and
    B - B0 = s (dL C + L0 dC). Subtracting B0 from B instead would cancel all the digits of a small update in bfloat16.
    """
    if through_base(slots):
        right = slots["right0"].float()
        return _product(right.T, scale * core_difference(slots, config), right)
    if "right0" in slots and "left" not in slots and "right" not in slots:
        return _product(slots["left0"].float(), scale * core_difference(slots, config), slots["right0"].float())
    left, core = _now(slots, "left"), scale * _core(_now(slots, "core"), slots, config)
    if "right0" not in slots:
        return _product(left, core, slots["right"].float())
    moved, parts = [], []
    if "left" in slots:
        moved.append(times(slots["left"].float(), core))
    if "core" in slots:
        moved.append(times(slots["left0"].float(), scale * core_difference(slots, config)))
    if moved:
        parts.append(Product(sum(moved[1:], moved[0]), None, slots["right0"].float()))
    if "right" in slots:
        parts.append(Product(times(left, core), None, slots["right"].float()))
    return join(parts)


def core_difference(slots: Slots, config: SpectralConfig) -> Tensor:
    """C - C0 where the start left the base: what learns itself, unless the core is a function of it."""
    if not config.shapes_core:
        return slots["core"].float()
    return _core(_now(slots, "core"), slots, config) - _core(slots["core0"].float(), slots, config)


def cut(slots: Slots) -> Product | None:
    """The cut of the spectrum that leaves the base, if there is one."""
    return Product(slots["cut_left"], None, slots["cut_right"]) if "cut_left" in slots else None


def largest_cut(every: Iterable[Slots]) -> Product | None:
    """What leaves the base for several adapters: cuts of one weight are nested, so the largest holds the others."""
    largest = None
    for slots in every:  # a plain loop: torch.compile breaks its graph at max(key=)
        found = cut(slots)
        if found is not None and (largest is None or found.up.shape[1] > largest.up.shape[1]):
            largest = found
    return largest


def join(parts: list[Product]) -> Product:
    """One product for the sum of several."""
    if len(parts) == 1:
        return parts[0]
    factors = [part.folded() for part in parts]
    return Product(torch.cat([up for up, _ in factors], 1), None, torch.cat([down for _, down in factors]))


def _core(raw: Tensor, slots: Slots, config: SpectralConfig) -> Tensor:
    size = len(slots["right0"] if "right0" in slots else slots["right"])
    if raw.is_meta or not config.shapes_core:
        return config.core(raw, slots.get("fixed"), size)
    with torch.autocast(raw.device.type, enabled=False):  # rounded, C - C0 would lose a small update
        return config.core(raw, slots.get("fixed"), size)


def _product(left: Tensor, core: Tensor, right: Tensor) -> Product:
    return Product(left, core, right) if core.ndim == 2 else Product(left * core, None, right)


def _now(slots: Slots, name: str) -> Tensor:
    start = slots.get(f"{name}0")
    if start is None:
        return slots[name].float()
    return start.float() + slots[name].float() if name in slots else start.float()
