"""The one layer of the family: y = base(x) + update(x), over any base that can be read back."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from ..peft_type import PREFIX
from ..spectral import LowRank
from . import slots as slot
from .base.base_weight import BaseWeight
from .base.sharding import at_hand, whole_shape, wholes
from .filling import Filling
from .known import Adapter
from .merging import Merging
from .rows import mixed

living: weakref.WeakSet[SpectralLinear] = weakref.WeakSet()  # for what acts at every optimiser's step


class SpectralLinear(nn.Module, Filling, Merging, BaseTunerLayer):
    """A linear layer with adapters of the family; PEFT makes these, users meet them in `print(model)`.

    The base layer is called, never written: only `merge` does that, and `unmerge` puts the exact bits back (and
    `requantize`, on request, and `unload` puts them back). Slots are
    float32 parameters named `peft_kasa_learnt.<adapter>.<slot>` or `peft_kasa_frozen.<adapter>.<slot>` (TRL copies a
    reference by `.<adapter>.` in the name); products run in the dtype of the activations.

    Args:
        base_layer: Linear, Conv1D, or a quantised linear layer that PEFT can read back.
        name: the module's name in the model, used in errors and seeds.
    """

    adapter_layer_names = (PREFIX + "learnt",)  # what PEFT switches on and off, and reports as trained
    other_param_names = (PREFIX + "frozen", "adapters")

    def __init__(self, base_layer: nn.Module, name: str, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.base = BaseWeight(base_layer, name, **quantization)
        self.quantization_backend = self.base.backend
        self.in_features, self.out_features = _shape(base_layer, self.base.transposed)
        self.adapters: dict[str, Adapter] = {}
        self.peft_kasa_learnt, self.peft_kasa_frozen = nn.ModuleDict(), nn.ModuleDict()
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        living.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        living.add(self)  # copies and unpickled layers count too
        for known in self.adapters.values():
            known.trained = False

    def forget(self, adapter: str) -> None:
        """Drops an adapter without choosing another (PEFT's `delete_adapter` does)."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            if adapter in (kept := getattr(self, name)):
                del kept[adapter]

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

    def value(self, adapter: str) -> LowRank:
        """What learns, as it is now: left (m, k), core, right (k, n), differentiable (but for ZeRO-3's)."""
        self.settle(adapter)
        slots, config = self.whole_slots(adapter), self.adapters[adapter].config
        if slot.through_base(slots):
            slots = slots | {"left0": self.original().to(slots["right0"].device) @ slots["right0"].float().T}
        return slot.value(slots, config)

    def lowrank(self, *adapters: str) -> LowRank:
        """The whole update of these adapters together, the base not included: exact, and of low rank."""
        parts, every = [], []
        for name in adapters:
            self.settle(name)
            every.append(slots := self.whole_slots(name))
            product = self._product(name, slots)
            if slot.through_base(slots):
                product = product._replace(up=self.original() @ product.up)
            parts.append(product)
        if (cut := _largest_cut(every)) is not None:
            parts.append(slot.Product(-cut.up.float(), None, cut.down.float()))
        return slot.join(parts).lowrank()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's update in float32 and in the layout of the base weight: (out, in), Conv1D's (in, out)."""
        dense = self.lowrank(adapter).dense()
        return dense.T if self.base.transposed else dense

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Always: see `peft_kasa.export_lora`, which is exact where PEFT's convert_to_lora takes a dense SVD."""
        return True

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch. For it, bitsandbytes unpacks a repacked weight and gives it other scales: that is put right."""
        state = super().state_dict(*args, **kwargs)
        self.base.unpack()
        return state

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        self.base.ready(training=self.training or x.requires_grad)
        result = self.base.corrected(self.base_layer(x, *args, **kwargs), x)
        if self.disable_adapters or self.merged:
            return result
        asked = self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        names = [name for name in asked if name in self.adapters]
        if not names:
            return result
        for name in names:
            self.settle(name)
            if self.training and torch.is_grad_enabled():
                self.adapters[name].trained = True  # never read here: torch.compile would compile the next step anew
        with at_hand(self, self._used(names)):
            if adapter_names is not None:
                return mixed(result, x, adapter_names, self)
            return result + self.update(x, names).to(result.dtype)

    def _used(self, names: list[str]) -> list[Tensor]:
        every = [self.slots(name) for name in names]
        weight = [self.base_layer.weight] if any(map(slot.through_base, every)) else []
        return [value for slots in every for value in slots.values()] + weight

    def update(self, x: Tensor, names: list[str]) -> Tensor:
        """What these adapters together add to the base's result: (..., n) -> (..., m)."""
        whole: list[slot.Product] = []  # those that share the input
        outputs: list[Tensor] = []
        inward: list[Tensor] = []  # what the base's weight has yet to be applied to
        every = [self.slots(name) for name in names]
        if (cut := _largest_cut(every)) is not None:
            whole.append(cut._replace(up=-cut.up))
        for name, slots in zip(names, every, strict=True):
            config, product = self.adapters[name].config, self._product(name, slots)
            drops = self.training and config.dropout
            if slot.through_base(slots):
                inward.append(product(F.dropout(x, config.dropout) if drops else x))
            elif drops:
                outputs.append(product(F.dropout(x, config.dropout)))
            else:
                whole.append(product)
        if whole:
            outputs.append(slot.join(whole)(x))
        if inward:
            outputs.append(self.base.apply(sum(inward[1:], inward[0])))
        return sum(outputs[1:], outputs[0])

    def _product(self, adapter: str, slots: slot.Slots) -> slot.Product:
        known = self.adapters[adapter]
        return slot.update(slots, known.config, known.scale)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves, and unlike PEFT's own does not cast: masters stay float32."""
        target = device if device is not None else self.base.device
        if adapter_name in self.adapters and not self.on_meta(adapter_name):
            for holder in (self.peft_kasa_learnt, self.peft_kasa_frozen):
                holder[adapter_name].to(target)

    def __repr__(self) -> str:
        parts = [f"{name}: {a.config.name} r={a.rank} s={a.scale:g}" for name, a in self.adapters.items()]
        return f"SpectralLinear({', '.join([*parts, f'base={self.base_layer!r}'])})"


def _largest_cut(every: list[dict[str, Tensor]]) -> slot.Product | None:
    """What leaves the base for several adapters: cuts of one weight are nested, so the largest holds the others."""
    largest = None
    for slots in every:  # a plain loop: torch.compile breaks its graph at max(key=)
        cut = slot.cut(slots)
        if cut is not None and (largest is None or cut.up.shape[1] > largest.up.shape[1]):
            largest = cut
    return largest


def _shape(layer: nn.Module, transposed: bool) -> tuple[int, int]:
    """(in, out) features."""
    if transposed:
        n, m = whole_shape(layer.weight)
        return n, m
    return layer.in_features, layer.out_features
