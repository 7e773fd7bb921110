"""The residual base in 4 bits, as QPiSSA has it: what the start takes out of W in float need not be quantised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..methods.method import require
from ..spectral import Engine
from ..spectral.plan import Ask
from . import slots as slot
from .base.fingerprint import FINGERPRINT, FOREIGN, sketch
from .base.float_weights import Weights, reader
from .base.fourbit import FourBit
from .base.sharding import in_parts
from .layer import SpectralLinear
from .starting import adapted


class Loss(NamedTuple):
    """Frobenius norms of a module's float weight W, and of what its storage is away from it."""

    weight: float  # |W|
    before: float  # |W - Q(W)|
    after: float  # |W - (Q(W - start) + start)|


@dataclass
class Requantized:
    """What `requantize` made.

    Attributes:
        modules: by name, the norms of each module.
    """

    modules: Mapping[str, Loss] = field(repr=False)

    @property
    def before(self) -> float:
        """The error of plain quantisation over all modules, relative to the weights (Frobenius)."""
        return self._norm(1) / self._norm(0)

    @property
    def after(self) -> float:
        """The same with the residual requantised."""
        return self._norm(2) / self._norm(0)

    @property
    def gain(self) -> float:
        """The share of the error that is gone: 1 - after / before."""
        return 1 - self.after / self.before

    def _norm(self, which: int) -> float:
        return math.hypot(*(loss[which] for loss in self.modules.values()))

    def __str__(self) -> str:
        return (
            f"{len(self.modules)} modules: quantisation error {self.before:.2%} of the weights' norm before, "
            f"{self.after:.2%} after ({self.gain:.1%} less)"
        )


class _Made(NamedTuple):
    """What a layer gets, on the CPU until all layers have theirs."""

    slots: dict[str, Tensor]  # of the start
    held: FourBit
    correction: slot.Product
    loss: Loss


@torch.no_grad()
def requantize(model: nn.Module, weights: Weights, adapter: str = "default", iterations: int = 5) -> Requantized:
    """Gives an untrained adapter's layers a 4-bit base that lies closer to the float weights W (QPiSSA).

    The start is taken from W, the residual is quantised in the base's own format, and the start is taken again from
    what that leaves: start = best of rank r (W - Q), Q = 4 bits of (W - start). From then on the layer's base is
    Q + start, the start in float32 beside the 4 bits, and the adapter learns on it as on any other: disabling it, other
    adapters, merging and exporting mean what they always do. `unload` puts the first 4 bits back; they are kept on the
    CPU, in half a byte a parameter.

    Args:
        model: a PeftModel on a bitsandbytes 4-bit base, or a model with adapters injected.
        weights: the float weights that the base was quantised from: a float model of the same class, its state dict, or
            the folder of its safetensors files, of which one weight is read at a time.
        adapter: one whose start leaves the base and whose frames are saved (PiSSA, MiLoRA, SORSA, CorDA, LoRA-Null).
        iterations: how often to alternate. Above 1 only for starts at the largest singular triples (PiSSA, SORSA).

    Raises:
        ValueError: another base, kind of adapter or weights, or an adapter that has moved. Nothing is changed then.

    Examples:
        >>> import torch
        >>> from bitsandbytes.nn import Linear4bit
        >>> from peft import get_peft_model
        >>> from peft_kasa import PiSSAConfig, requantize
        >>> weight = torch.randn(64, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(64, 64)
        >>> base = torch.nn.Sequential(Linear4bit(64, 64, bias=False, quant_type="nf4"))
        >>> _ = base.load_state_dict({"0.weight": weight})
        >>> model = get_peft_model(base.to("cpu"), PiSSAConfig(r=8, target_modules=["0"]))
        >>> report = requantize(model, {"0.weight": weight})
        >>> report.after < 0.5 * report.before
        True
    """
    require(iterations >= 1, "iterations has to be at least 1", iterations)
    layers = adapted(model, adapter)
    for layer in layers.values():
        _check(layer, adapter, iterations)
    read = reader(weights, list(layers))
    made = {name: _made(layer, adapter, read, iterations) for name, layer in layers.items()}
    for name, layer in layers.items():
        _apply(layer, adapter, made[name])
    return Requantized({name: one.loss for name, one in made.items()})


def _check(layer: SpectralLinear, adapter: str, iterations: int) -> None:
    known, slots = layer.adapters[adapter], layer.slots(adapter)
    check_base(layer)
    method = known.config.name
    rule = f"{layer.name}: {{}} (adapter {adapter!r}, {method})"
    require("right0" in slots, rule.format("the start has to leave the base, as PiSSA's does"), method)
    kept = known.config.keeps_frames and not slot.through_base(slots)
    require(kept, rule.format("the frames have to be saved, as the new base does not give them again"), method)
    require(len(layer.adapters) == 1, f"{layer.name}: no other adapter may be there yet", list(layer.adapters))
    require(not layer.has_moved(adapter), rule.format("requantize before training, and before loading"), "moved")
    top = known.asks == [Ask(known.rank, "top")]
    once = "iterations has to be 1 for a start that is not at the largest singular triples"
    require(top or iterations == 1, rule.format(once), iterations)


def check_base(layer: SpectralLinear) -> None:
    """Raises ValueError unless the layer is on a whole 4-bit weight of its own, not replaced yet."""
    whole = not in_parts(layer.base_layer.weight) and not layer.base_layer.weight.is_meta
    require(whole, f"{layer.name}: the base weight has to be in one piece, before any sharding or offloading", "parts")
    kind = type(layer.base_layer).__name__
    require(layer.base.four_bits() is not None, f"{layer.name}: the base has to be bitsandbytes 4-bit", kind)
    require(not layer.merged, f"{layer.name}: unmerge_adapter first", layer.merged_adapters)
    require(layer.base.correction is None, f"{layer.name}: its base may be replaced once: unload first", "replaced")


def _made(layer: SpectralLinear, adapter: str, read: Callable[[str], Tensor], iterations: int) -> _Made:
    """The alternation, on the base's device."""
    weight, plain = read(layer.name), layer.base.matrix()
    shape = tuple(plain.shape)
    require(weight.shape == plain.shape, f"{layer.name}: its float weight has to be of shape {shape}", weight.shape)
    weight = weight.to(plain.device)
    norm, before = weight.norm().item(), (weight - plain).norm().item()
    rule = f"{layer.name}: the float weight has to be the one that was quantised, to {FOREIGN} of its norm"
    require(before <= FOREIGN * norm, rule, f"distance {before / norm if norm else math.inf:.2f}")
    like: Any = layer.base.four_bits()
    rest, engine, config = weight, Engine(), layer.adapters[adapter].config
    for _ in range(iterations):
        slots = slot.pack(layer.start_at(adapter, rest, engine))
        taken = slot.value(slots, config).scaled(layer.adapters[adapter].scale)
        held = like.quantized(weight - taken.dense())
        rest = weight - held.matrix().float()
    correction = slot.Product(taken.up().cpu(), None, taken.right.to("cpu", copy=True))
    loss = Loss(norm, before, (rest - taken.dense()).norm().item())
    return _Made({name: value.cpu() for name, value in slots.items()}, held.to("cpu"), correction, loss)


def _apply(layer: SpectralLinear, adapter: str, made: _Made) -> None:
    layer.base.replace(made.held, made.correction)
    layer.fill(adapter, made.slots | {FINGERPRINT: sketch(layer.base.matrix(as_repacked=True))})
    layer.remember(adapter)
