"""Files of the family's adapters."""

from __future__ import annotations

from functools import cached_property

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from ..adapter import slots as slot
from ..adapter.files.anchors import ACROSS, DOWN
from ..adapter.files.config_file import AdapterConfigFile
from ..adapter.filling import given_rank, module_scale
from ..adapter.keys import FROZEN, LEARNT
from ..adapter.layer import SpectralLinear
from ..methods.method import SpectralConfig, require
from ..spectral import LowRank
from .adapter_file import AdapterFile
from .experts import pattern_name

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
        for name, slots in modules.items():
            self._check_shapes(name, slots)
        return modules

    def _check_shapes(self, name: str, slots: dict[str, Tensor]) -> None:
        """With another r in the config than the tensors have, all that is said of them would be wrong."""
        layer = self._outline(name, slots)
        layer.reserve(INSPECTED, self.config)
        expected = layer.slots(INSPECTED)
        for key in sorted(slots.keys() & expected.keys()):
            wanted, found = tuple(expected[key].shape), tuple(slots[key].shape)
            rule = f"{name}: {key} has to be of shape {wanted} with the r and rank_pattern of {CONFIG_NAME}"
            require(found == wanted, f"{rule}. Restore both files from their source", found)

    def _outline(self, name: str, slots: dict[str, Tensor]) -> SpectralLinear:
        """A layer of the module's shape, without a weight; where no tensor has a side, that is of no account."""
        said = given_rank(self.config, pattern_name(name)) or self.config.r or len(slots["core"])
        rows = next((len(slots[key]) for key in DOWN if key in slots), None)
        columns = next((slots[key].shape[-1] for key in ACROSS if key in slots), None)
        m, n = rows or columns or said, columns or rows or said
        layer = SpectralLinear(nn.Linear(n, m, bias=False, device="meta"), name)
        layer.pattern_name = pattern_name(name)
        return layer

    def rank(self, name: str) -> int:
        return given_rank(self.config, pattern_name(name)) or self.config.r or len(self.slots[name]["core"])

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
        parts = [slot.update(slots, config, module_scale(config, pattern_name(name), self.rank(name)))]
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
