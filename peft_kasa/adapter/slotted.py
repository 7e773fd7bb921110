"""A base layer, and the slots that adapters have beside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base.base_weight import BaseWeight
from .base.sharding import whole_shape, wholes
from .known import Adapter


class Slotted(nn.Module):
    """What a `SpectralLinear` holds: the base layer, what it knows of each adapter, and the adapter's slots."""

    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module, name: str, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = self.pattern_name = name  # the latter is what patterns of a config are matched with
        self.base = BaseWeight(base_layer, name, **quantization)
        self.in_features, self.out_features = _shape(base_layer, self.base.transposed)
        self.adapters: dict[str, Adapter] = {}
        self.peft_kasa_learnt, self.peft_kasa_frozen = nn.ModuleDict(), nn.ModuleDict()
        self.merged_adapters = []

    @property
    def stored(self) -> Tensor:
        """The parameter that holds the base weight, whatever its shape and wherever its parts are."""
        return self.base_layer.weight  # type: ignore[return-value]

    def slots(self, adapter: str) -> dict[str, Tensor]:
        """The adapter's tensors by slot name, its fingerprint of the base among them."""
        holders = (self.peft_kasa_learnt[adapter], self.peft_kasa_frozen[adapter])
        return {name: value for holder in holders for name, value in holder._parameters.items()}  # type: ignore[misc]

    def learning(self, adapter: str) -> list[Tensor]:
        """Those of the adapter's slots that an optimiser would step now."""
        return [value for value in self.slots(adapter).values() if value.requires_grad]

    def whole_slots(self, adapter: str) -> dict[str, Tensor]:
        """The same, put together where processes hold them in parts: every process has to ask."""
        return wholes(self.slots(adapter))

    def learnt(self, adapter: str) -> set[str]:
        """The names of the adapter's slots that learn."""
        return set(self.peft_kasa_learnt[adapter]._parameters)

    def on_meta(self, adapter: str) -> bool:
        """Whether the adapter's slots, or the base weight, are without storage."""
        return self.base.absent or any(value.is_meta for value in self.slots(adapter).values())


def _shape(layer: nn.Module, transposed: bool) -> tuple[int, int]:
    """(in, out) features."""
    if transposed:
        n, m = whole_shape(layer.weight)
        return n, m
    return layer.in_features, layer.out_features
