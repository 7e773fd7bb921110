"""The one layer of the family: y = base(x) + update(x), over any base that can be read back."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from . import slots as slot
from .base.sharding import at_hand
from .keys import FROZEN, LEARNT
from .merging import Merging
from .rows import mixed

_living: weakref.WeakSet[SpectralLinear] = weakref.WeakSet()
_counting = threading.RLock()  # a thread may step an optimiser while another makes or copies a model


def living() -> list[SpectralLinear]:
    """All layers of the process, for what acts at every optimiser's step."""
    with _counting:
        return list(_living)


class SpectralLinear(Merging, BaseTunerLayer):
    """A linear layer with adapters of the family; PEFT makes these, users meet them in `print(model)`.

    The base layer is called. Only `merge` and, on request, `requantize` write it; `unmerge` and `unload` put the exact
    bits back. Slots are float32 parameters named `peft_kasa_learnt.<adapter>.<slot>` or
    `peft_kasa_frozen.<adapter>.<slot>` (TRL copies a reference by `.<adapter>.` in the name); products run in the dtype
    of the activations.

    Args:
        base_layer: Linear, Conv1D, or a quantised linear layer that PEFT can read back.
        name: the module's name in the model, used in errors and seeds.
    """

    adapter_layer_names = (LEARNT,)  # what PEFT switches on and off, and reports as trained
    other_param_names = (FROZEN, "adapters")

    def __init__(self, base_layer: nn.Module, name: str, **quantization: Any) -> None:
        super().__init__(base_layer, name, **quantization)
        self.quantization_backend = self.base.backend
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._count()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._count()  # copies and unpickled layers count too
        for adapter, known in self.adapters.items():
            known.trained = False
            known.masters |= {
                name: v.data
                for name, v in self.peft_kasa_learnt[adapter].named_parameters()
                if v.dtype == torch.float32
            }

    def _count(self) -> None:
        with _counting:
            _living.add(self)

    def forget(self, adapter: str) -> None:
        """Drops an adapter without choosing another (PEFT's `delete_adapter` does)."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            if adapter in (kept := getattr(self, name)):
                del kept[adapter]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Always: see `peft_kasa.export_lora`, which is exact where PEFT's convert_to_lora takes a dense SVD."""
        return True

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch. For it, bitsandbytes unpacks a repacked weight and gives it other scales: that is put right."""
        state = super().state_dict(*args, **kwargs)
        self.base.unpack()
        return state

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        names = self.acting(adapter_names)
        self.base.ready(training=self.training or x.requires_grad)
        result = self.base.corrected(self.base_layer(x, *args, **kwargs), x)
        if self.merged or self.disable_adapters or not (names or adapter_names):
            return result
        gathered = names if adapter_names is None else list(self.adapters)  # other processes' rows may need others
        with at_hand(self, self._used(gathered)):
            if adapter_names is not None:
                return mixed(result, x, adapter_names, self)
            return self.updated(result, x, names)

    def acting(self, asked: Sequence[str] | None = None) -> list[str]:
        """The adapters, of those asked for or of the active ones, whose updates this forward pass is to add.

        Before that it unmerges what is switched off, gives values to adapters that have none yet, and in training
        marks them as trained.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        known = dict.fromkeys(self.active_adapters if asked is None else asked)  # a name said twice acts once
        names = [name for name in known if name in self.adapters]
        for name in names:
            self.settle(name)
            if self.training and torch.is_grad_enabled():
                self.adapters[name].trained = True  # never read here: torch.compile would compile the next step anew
        return names

    def _used(self, names: list[str]) -> list[Tensor]:
        every = [self.slots(name) for name in names]
        weight = [self.stored] if any(map(slot.through_base, every)) else []
        return [value for slots in every for value in slots.values()] + weight

    def updated(self, result: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """The base's result (..., m) for x (..., n), with what these adapters together add."""
        whole: list[slot.Product] = []  # those that share the input
        inward: list[Tensor] = []  # what the base's weight has yet to be applied to
        every = [self.slots(name) for name in names]
        if (cut := slot.largest_cut(every)) is not None:
            whole.append(cut._replace(up=-cut.up))
        for name, slots in zip(names, every, strict=True):
            config, product = self.adapters[name].config, self._product(name, slots)
            drops = self.training and config.dropout
            if slot.through_base(slots):
                inward.append(product(F.dropout(x, config.dropout) if drops else x))
            elif drops:
                result = product(F.dropout(x, config.dropout), result)
            else:
                whole.append(product)
        if whole:
            result = slot.join(whole)(x, result)
        if inward:
            result = result + self.base.apply(sum(inward[1:], inward[0])).to(result.dtype)
        return result

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves, and unlike PEFT's own does not cast: masters stay float32."""
        target = device if device is not None else self.base.device
        if adapter_name in self.adapters and not self.on_meta(adapter_name):
            for holder in (self.peft_kasa_learnt, self.peft_kasa_frozen):
                holder[adapter_name].to(target)

    def __repr__(self) -> str:
        parts = [f"{name}: {a.config.name} r={a.rank} s={a.scale:g}" for name, a in self.adapters.items()]
        return f"{type(self).__name__}({', '.join([*parts, f'base={self.base_layer!r}'])})"
