"""Names of modules in the patterns of a config, and of adapters."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from ..methods.method import SpectralConfig
from ..peft_type import PREFIX
from .base.fingerprint import FINGERPRINT
from .slots import CUT, LEARNABLE

BASE = "__base__"  # PEFT's name for rows of a batch without an adapter


def exactly(name: str, names: Collection[str]) -> str:
    """The name as a pattern that no other of these names matches: PEFT's patterns also match what ends in them."""
    return f"^{re.escape(name)}" if any(other.endswith(f".{name}") for other in names) else name


def target(config: SpectralConfig, model: nn.Module, names: set[str], stacks: Collection[str] = ()) -> None:
    """Makes these modules and stacks of experts the config's targets, and no other that ends in one of their names."""
    config.target_parameters = sorted(stacks) or None
    ends = tuple(f".{name}" for name in names)
    config.target_modules = names
    if sum(f".{path}".endswith(ends) for path, _ in model.named_modules()) > len(names):
        config.target_modules = "|".join(re.escape(name) for name in sorted(names))
        config.layers_to_transform = config.layers_pattern = None


def check_name(adapter: str) -> None:
    """PEFT filters a state dict by `.<adapter>` in its keys, so a name that is also a slot's would lose tensors.

    Raises:
        ValueError: such a name, one with a dot, or PEFT's own for no adapter.
    """
    slots = {*LEARNABLE, *(f"{slot}0" for slot in LEARNABLE), *CUT, "fixed", FINGERPRINT}
    taken = adapter in {*slots, BASE} or adapter.startswith(PREFIX) or hasattr(nn.ModuleDict(), adapter)
    if taken or not adapter or "." in adapter:
        raise ValueError(
            f"An adapter's name may not be a part of its tensors' names, nor have a dot. Found {adapter!r}: call it "
            f"'{adapter.replace('.', '_')}_adapter', say."
        )
