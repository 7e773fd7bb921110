"""A warning of 4-bit layers that bitsandbytes computes wrongly on the CPU, whatever adapts them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from .base_weight import BaseWeight


def warn_of_misread(weights: Mapping[str, BaseWeight]) -> None:
    """Warns once, with the first module's name and figures, of 4-bit weights whose blocks run on from row to row.

    Args:
        weights: by module name, those that are about to be adapted.
    """
    found = [name for name, base in weights.items() if _misread(base)]
    if found:
        warnings.warn(_text(found[0], weights[found[0]], len(found)), stacklevel=3)


def _misread(base: BaseWeight) -> bool:
    weight = base.layer.weight
    here = not base.absent and weight.device.type == "cpu"  # type: ignore[union-attr]
    return here and (held := base.four_bits()) is not None and held.runs_on


def _text(name: str, base: BaseWeight, count: int) -> str:
    held = base.four_bits()
    assert held is not None
    others = f" There are {count} such modules." if count > 1 else ""
    return (
        f"{name}: on the CPU bitsandbytes needs in_features that are a multiple of the 4-bit block size "
        f"{held.scales.blocksize}. Found {held.scales.shape[-1]}: it computes this layer with a weight that is off by "
        f"{held.misreading():.0%} of its norm, and raises in evaluation on CPUs with AVX512-BF16. The adapter starts "
        "from the weight as it is stored. Move the model to a GPU, load it in 8 bits or in float, or leave such layers "
        f"in float (llm_int8_skip_modules of BitsAndBytesConfig).{others}"
    )
