"""Files of the family's adapters."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..adapter import slots as slot
from ..adapter.files.config_file import AdapterConfigFile
from ..adapter.filling import given_rank, module_scale
from ..adapter.keys import FROZEN, LEARNT
from ..adapter.layer import SpectralLinear
from ..methods.method import SpectralConfig, require
from ..spectral import LowRank
from .adapter_file import AdapterFile

INSPECTED = "inspected"  # the adapter's name in a layer that is not the model's


class FamilyFile(AdapterFile):
    """An adapter of the family: slots that learn, and frozen ones."""

    @cached_property
    def config(self) -> SpectralConfig:
        """The method's config."""
        return AdapterConfigFile(**self.fields)  # type: ignore[return-value]

    @property
    def method(self) -> str:
        return self.config.name

    @cached_property
    def slots(self) -> dict[str, dict[str, Tensor]]:
        modules: dict[str, dict[str, Tensor]] = {}
        for module, name, value in self.found(rf"(?:{LEARNT}|{FROZEN})\.(?P<slot>\w+)"):
            modules.setdefault(module, {})[name] = value
        require(bool(modules), f"{self.path} has to hold slots of the family", sorted(self.tensors)[:3])
        return modules

    def rank(self, name: str) -> int:
        return given_rank(self.config, name) or self.config.r or len(self.slots[name]["core"])

    def learns(self, key: str) -> bool:
        return f".{FROZEN}." not in key

    @torch.no_grad()
    def update(self, name: str, layer: SpectralLinear | None = None) -> LowRank | None:
        if layer is not None:
            self._fill(name, layer)
            return layer.lowrank(INSPECTED)
        slots, config = self.slots[name], self.config
        if not config.keeps_frames or slot.through_base(slots):
            return None
        parts = [slot.update(slots, config, module_scale(config, name, self.rank(name)))]
        if (cut := slot.cut(slots)) is not None:
            parts.append(slot.Product(-cut.up.float(), None, cut.down.float()))
        return slot.join(parts).lowrank()

    def _fill(self, name: str, layer: SpectralLinear) -> None:
        """Gives a layer the adapter: what the file leaves out is computed from the base weight."""
        layer.reserve(INSPECTED, self.config)
        expected, held = layer.slots(INSPECTED), self.slots[name]
        for key, value in held.items():
            rule = f"{name}: the base does not fit the adapter. {key} has to be of shape"
            wanted = tuple(expected[key].shape) if key in expected else ()
            require(wanted == tuple(value.shape), f"{rule} {wanted}", tuple(value.shape))
            expected[key].copy_(value)
        layer.settle(INSPECTED)
