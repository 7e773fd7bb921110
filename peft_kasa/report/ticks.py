"""What axes name, and which of many indices are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence


def thinned(size: int, rank: int) -> list[int]:
    """Which of so many indices are drawn: densely at both ends, and on both sides of a cut of this rank at either."""
    steps = {int(1.35**power) for power in range(40)} | {0, rank - 1, rank}
    return sorted({index for step in steps for index in (step, size - 1 - step) if 0 <= index < size})


def log_ticks(values: Sequence[float]) -> list[float]:
    """What an axis of powers of ten names: some six, or 1, 2 and 5 times them where fewer than two are in range."""
    if not values:
        return []
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    inside = math.floor(math.log10(max(values))) - math.ceil(math.log10(min(values))) + 1
    digits = (1,) if inside > 1 else (1, 2, 5)
    powers = range(low, high + 1, 1 + (high - low) // 6)
    return [float(f"{digit}e{power}") for power in powers for digit in digits]


def layer_ticks(depths: Sequence[int]) -> list[int]:
    """Whole numbers from the first layer to the last, some ten of them."""
    low, high = min(depths, default=0), max(depths, default=0)
    return list(range(low, high + 1, 1 + (high - low) // 10))
