"""The one layer of the family: y = base(x) + update(x), over any base that can be read back."""

from __future__ import annotations

import weakref
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from ..methods.method import Site, SpectralConfig, Start, require
from ..peft_type import PREFIX
from ..spectral import Engine, LowRank
from ..spectral.lowrank import from_factors
from . import checkpoint
from . import slots as slot
from .base_weight import BaseWeight
from .fingerprint import FINGERPRINT, SIDE, sketch
from .merging import Merging

living: weakref.WeakSet[SpectralLinear] = weakref.WeakSet()  # for what acts at every optimiser's step


@dataclass
class Adapter:
    """What a layer knows of one adapter besides its tensors."""

    config: SpectralConfig
    rank: int
    scale: float
    awaiting: bool = True  # its slots have no values yet: a file or the method's start will give them
    peers: int = 1  # how many modules this adapter has in the model: what a mean runs over
    trained: bool = False  # a forward pass has asked for its gradients
    masters: dict[str, Tensor] = field(default_factory=dict)  # the learning slots' own float32 storage, no copies


class SpectralLinear(nn.Module, Merging, BaseTunerLayer):
    """A linear layer with adapters of the family; PEFT makes these, users meet them in `print(model)`.

    The base layer is called, never written: only `merge` does that, and `unmerge` puts the exact bits back. Slots are
    float32 parameters named `peft_kasa_learnt.<adapter>.<slot>` or `peft_kasa_frozen.<adapter>.<slot>` (TRL copies a
    reference by `.<adapter>.` in the name); products run in the dtype of the activations.

    Args:
        base_layer: Linear, Conv1D, or a quantised linear layer that PEFT can read back.
        name: the module's name in the model, used in errors and seeds.
    """

    adapter_layer_names = (PREFIX + "learnt", PREFIX + "frozen")
    other_param_names = ("adapters",)

    def __init__(self, base_layer: nn.Module, name: str, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.base = BaseWeight(base_layer, **quantization)
        self.quantization_backend = self.base.backend
        self.in_features, self.out_features = _shape(base_layer, self.base.transposed)
        self.adapters: dict[str, Adapter] = {}
        self.peft_kasa_learnt, self.peft_kasa_frozen = nn.ModuleDict(), nn.ModuleDict()
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        living.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        living.add(self)  # copies and unpickled layers count too
        for known in self.adapters.values():
            known.trained = False

    def reserve(self, adapter: str, config: SpectralConfig, rank: int, scale: float) -> None:
        """Makes the slots of an adapter, without values: NaN until `begin` or a file gives them."""
        m, n = self.out_features, self.in_features
        rule = f"{self.name}: r has to be at most min(out, in) = min({m}, {n}) (see rank_pattern)"
        require(rank <= min(m, n), rule, rank)
        self.adapters[adapter] = Adapter(config, rank, scale)
        start = self._start(adapter, torch.empty(m, n, device="meta"), Engine())
        shapes = {name: tuple(value.shape) for name, value in slot.pack(start).items()} | {FINGERPRINT: (SIDE, SIDE)}
        self.peft_kasa_learnt[adapter], self.peft_kasa_frozen[adapter] = nn.Module(), nn.Module()
        self.frozen_peft_weight_names[adapter] = (PREFIX + "frozen",)
        for name, shape in shapes.items():
            empty = torch.full(shape, torch.nan, dtype=torch.float32, device=self.base_layer.weight.device)
            learns = name in start.train
            holder = self.peft_kasa_learnt if learns else self.peft_kasa_frozen
            holder[adapter].register_parameter(name, nn.Parameter(empty, requires_grad=learns))
            if learns:
                self.adapters[adapter].masters[name] = empty

    @torch.no_grad()
    def begin(self, adapter: str, engine: Engine) -> None:
        """Gives the adapter its method's start, computed from the base weight."""
        weight = self.base.matrix()
        if weight.is_meta:
            raise ValueError(
                f"{self.name}: the base weight is on the meta device (offloaded, or not loaded yet), so {adapter!r} "
                "cannot start from it. Load the base onto a device first."
            )
        if not torch.isfinite(torch.linalg.vector_norm(weight)) and (bad := int((~torch.isfinite(weight)).sum())):
            raise ValueError(f"{self.name}: the base weight has {bad} NaN or infinite entries. Load an intact base.")
        values = slot.pack(self._start(adapter, weight, engine))
        values[FINGERPRINT] = sketch(self.base.matrix(as_repacked=True))
        noise = None if self.adapters[adapter].config.init_weights else self._generator(adapter, "noise")
        learnt = dict(self.peft_kasa_learnt[adapter].named_parameters())
        for name, parameter in self.slots(adapter).items():
            parameter.copy_(value := values[name])
            if noise is not None and name in learnt:
                parameter.add_(
                    torch.empty(value.shape, dtype=torch.float32, device="cpu")
                    .normal_(0, 0.05, generator=noise)
                    .to(parameter.device)
                )
        self.adapters[adapter].awaiting = False

    def settle(self, adapter: str) -> None:
        """Makes sure that the adapter has values: a file's, checked, or else its method's start."""
        known = self.adapters[adapter]
        if not known.awaiting:
            return
        if checkpoint.arrived(self.name, self.base, adapter, self.slots(adapter)):
            known.awaiting = False
        else:
            self.begin(adapter, Engine())

    def forget(self, adapter: str) -> None:
        """Drops an adapter without choosing another (PEFT's `delete_adapter` does)."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            if adapter in (kept := getattr(self, name)):
                del kept[adapter]
        self.frozen_peft_weight_names.pop(adapter, None)

    def on_meta(self, adapter: str) -> bool:
        """Whether the adapter's slots, or the base weight, are without storage."""
        return self.base_layer.weight.is_meta or any(value.is_meta for value in self.slots(adapter).values())

    def slots(self, adapter: str) -> dict[str, Tensor]:
        """The adapter's tensors by slot name, its fingerprint of the base among them."""
        holders = (self.peft_kasa_learnt[adapter], self.peft_kasa_frozen[adapter])
        return {name: value for holder in holders for name, value in holder._parameters.items()}  # type: ignore[misc]

    def value(self, adapter: str) -> LowRank:
        """What learns, as it is now: left (m, k), core, right (k, n), differentiable."""
        self.settle(adapter)
        return slot.value(self.slots(adapter))

    def lowrank(self, *adapters: str) -> LowRank:
        """The whole update of these adapters together, the base not included: exact, and of low rank."""
        for name in adapters:
            self.settle(name)
        parts = [slot.update(self.slots(name), self.adapters[name].scale) for name in adapters]
        if (cut := self._cut(adapters)) is not None:
            parts.append((-cut[0].float(), cut[1].float()))
        return from_factors(*slot.join(parts))

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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.training or x.requires_grad:
            self.base.unpack()
        result = self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.adapters]
        if self.disable_adapters or self.merged or not names:
            return result
        for name in names:
            self.settle(name)
            self.adapters[name].trained |= self.training and torch.is_grad_enabled()
        return result + self._update(x, names).to(result.dtype)

    def _update(self, x: Tensor, names: list[str]) -> Tensor:
        whole: list[slot.Factors] = []  # products that share the input
        dropped: list[tuple[Tensor, slot.Factors]] = []
        if (cut := self._cut(names)) is not None:
            whole.append((-cut[0], cut[1]))
        for name in names:
            adapter = self.adapters[name]
            factors = slot.update(self.slots(name), adapter.scale)
            if self.training and adapter.config.dropout:
                dropped.append((F.dropout(x, adapter.config.dropout), factors))
            else:
                whole.append(factors)
        products = [_apply(part, *factors) for part, factors in dropped]
        if whole:
            products.append(_apply(x, *slot.join(whole)))
        return sum(products[1:], products[0])

    def _cut(self, adapters: Any) -> slot.Factors | None:
        """What leaves the base for these adapters: cuts of one weight are nested, so the largest holds the others."""
        largest = None
        for name in adapters:  # a plain loop: torch.compile breaks its graph at max(key=)
            cut = slot.cut(self.slots(name))
            if cut is not None and (largest is None or cut[0].shape[1] > largest[0].shape[1]):
                largest = cut
        return largest

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves, and unlike PEFT's own does not cast: masters stay float32."""
        target = device if device is not None else self.base_layer.weight.device
        if adapter_name in self.adapters and not self.on_meta(adapter_name):
            for holder in (self.peft_kasa_learnt, self.peft_kasa_frozen):
                holder[adapter_name].to(target)

    def __repr__(self) -> str:
        parts = [f"{name}: {a.config.name} r={a.rank} s={a.scale:g}" for name, a in self.adapters.items()]
        return f"SpectralLinear({', '.join([*parts, f'base={self.base_layer!r}'])})"

    def _generator(self, adapter: str, use: str = "") -> torch.Generator:
        seed = self.adapters[adapter].config.seed
        return torch.Generator().manual_seed(zlib.crc32(f"{seed} {self.name} {use}".encode()))

    def _start(self, adapter: str, weight: Tensor, engine: Engine) -> Start:
        known = self.adapters[adapter]
        site = Site(self.name, weight, known.rank, known.scale, self._generator(adapter), engine)
        try:
            return known.config.start(site)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


def _apply(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def _shape(layer: nn.Module, transposed: bool) -> tuple[int, int]:
    """(in, out) features."""
    if transposed:
        n, m = layer.weight.shape
        return n, m
    return layer.in_features, layer.out_features
