"""A `Start` as the tensors that a layer keeps, and those tensors as the factors of its update.

Where the start leaves the base, the layer keeps it frozen (`left0, core0, right0`) and learns zero-initialised
differences (`left, core, right`). Elsewhere `left, core, right` are the values themselves, and a cut of the spectrum
that leaves the base is kept as `cut_left, cut_right`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..methods.method import Start
from ..spectral import LowRank
from ..spectral.lowrank import times

LEARNABLE = ("left", "core", "right")

Slots = Mapping[str, Tensor]
Factors = tuple[Tensor, Tensor]  # up (m, k) and down (k, n)


def pack(start: Start) -> dict[str, Tensor]:
    """The slots of a start, by name; `LEARNABLE` ones that are not in `start.train` stay frozen."""
    trained = start.trained._asdict()
    if start.displaced == "start":
        differences = {name: torch.zeros_like(trained[name]) for name in start.train}
        return {f"{name}0": value for name, value in trained.items()} | differences
    if start.displaced is None:
        return trained
    cut_left, cut_right = start.displaced.factors()  # type: ignore[union-attr]
    return trained | {"cut_left": cut_left, "cut_right": cut_right}


def value(slots: Slots) -> LowRank:
    """What learns, as it is now: L, C, R in float32."""
    if "left0" not in slots:
        return LowRank(*(slots[name].float() for name in LEARNABLE))
    return LowRank(*(slots[f"{n}0"].float() + slots[n].float() if n in slots else slots[f"{n}0"] for n in LEARNABLE))


def update(slots: Slots, scale: float) -> Factors:
    """Factors of s L C R minus the start (where it left the base); a cut is not in it.

    The difference is telescoped: with B = s L C and B0 = s L0 C0 it is (B - B0) R0 + B dR, and
    B - B0 = s (dL C + L0 dC). Subtracting B0 from B instead would cancel all the digits of a small update in bfloat16.
    """
    left, core, right = value(slots)
    if "left0" not in slots:
        return scale * times(left, core), right
    moved = torch.zeros_like(left)
    if "left" in slots:
        moved = moved + times(slots["left"].float(), core)
    if "core" in slots:
        moved = moved + times(slots["left0"].float(), slots["core"].float())
    right0 = slots["right0"].float()
    if "right" not in slots:
        return scale * moved, right0
    return torch.cat([scale * moved, scale * times(left, core)], 1), torch.cat([right0, slots["right"].float()])


def cut(slots: Slots) -> Factors | None:
    """Factors of the cut of the spectrum that leaves the base, if there is one."""
    return (slots["cut_left"], slots["cut_right"]) if "cut_left" in slots else None


def join(parts: list[Factors]) -> Factors:
    """One pair of factors for the sum of several."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([up for up, _ in parts], 1), torch.cat([down for _, down in parts])
