"""A warning of 4-bit layers that bitsandbytes computes wrongly on the CPU, whatever adapts them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from .base_weight import BaseWeight
from .fourbit import FourBit


def warn_of_misread(weights: Mapping[str, BaseWeight]) -> None:
    """Warns once, with the worst module's name and figures, of 4-bit weights whose blocks run on from row to row.

    Args:
        weights: by module name, those that are about to be adapted.
    """
    found = {name: held for name, base in weights.items() if (held := _running_on(base)) is not None}
    if found:
        off = {name: held.misreading() for name, held in found.items()}
        worst = max(off, key=lambda name: off[name])
        warnings.warn(_text(worst, found[worst], off[worst], len(found)), stacklevel=3)


def _running_on(base: BaseWeight) -> FourBit | None:
    weight = base.layer.weight
    here = not base.absent and weight.device.type == "cpu"  # type: ignore[union-attr]
    held = base.four_bits() if here else None
    return held if held is not None and held.runs_on else None


def _text(name: str, held: FourBit, off: float, count: int) -> str:
    reads = f"computes this layer with a weight that is off by {off:.0%} of its norm, and " if off else ""
    others = f" There are {count} such modules." if count > 1 else ""
    return (
        f"{name}: on the CPU bitsandbytes needs in_features that are a multiple of the 4-bit block size "
        f"{held.scales.blocksize}. Found {held.scales.shape[-1]}: it {reads}raises in evaluation on CPUs with "
        "AVX512-BF16. The adapter starts from the weight as it is stored. Move the model to a GPU, load it in 8 bits "
        f"or in float, or leave such layers in float (llm_int8_skip_modules of BitsAndBytesConfig).{others}"
    )
