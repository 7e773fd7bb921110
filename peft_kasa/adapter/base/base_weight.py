"""The base layer's weight as a float32 matrix, whatever it is stored as."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..slots import Product
from .fourbit import FourBit, packed, state_of, unpacked
from .offload import away, brought, work_device
from .sharding import in_parts, in_zero3, whole


class Quantised(NamedTuple):
    """What `overwrite` takes out of a quantised layer."""

    weight: nn.Parameter
    scales: Any  # of a 4-bit weight
    taken: tuple[Tensor, Tensor] | None  # what the matrix state of an 8-bit layer has taken over: CB, SCB
    correction: Product | None


class BaseWeight:
    """Reads one base layer; `overwrite` writes it, for merging, and `replace`, for `requantize`.

    After `replace` the weight is what the layer holds plus `correction`, a product in float32 beside it.

    bitsandbytes repacks a 4-bit weight in place at the first evaluation on a CPU with AVX512-BF16: it rounds the block
    scales to bfloat16, loses the gradient of whatever is trained below from then on, and puts other scales back when a
    state dict is taken (wrong ones without double quantisation). The scales from before are kept, by reference, so that
    reading gives the same numbers before and after, and `unpack` puts the bits back.
    """

    def __init__(self, layer: nn.Module, name: str = "", **quantization: Any) -> None:
        self.layer, self.name = layer, name
        self.backend = resolve_quantization_backend(layer, **quantization)
        self.transposed = isinstance(layer, Conv1D)
        self._scales = _kept_scales(layer) or self._current_scales()
        self._gathered: Tensor | None = None
        self.correction: Product | None = None
        self.first: FourBit | None = None  # what the layer held before `replace`, on the CPU

    @property
    def device(self) -> torch.device:
        """Where the layer computes, and its adapters' slots live."""
        return work_device(self.layer)

    @property
    def absent(self) -> bool:
        """Whether there is no weight: not loaded yet. An offloaded one is there."""
        return self.layer.weight.is_meta and not away(self.layer)  # type: ignore[union-attr, operator]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keeps a weight that processes hold in parts as a whole, so that any of them may read it, or none."""
        self._gathered = whole(self.layer.weight).detach() if in_parts(self.layer.weight) else None
        try:
            yield
        finally:
            self._gathered = None

    def matrix(self, as_repacked: bool = False) -> Tensor:
        """(out, in), float32, a copy unless the layer holds it so; on the meta device if the layer is there.

        With `as_repacked`, 4-bit scales are rounded to bfloat16 as repacking does: the same whether or not it happened.
        Of a weight in parts every process has to read it, or `gathered` before.
        """
        with brought(self.layer):
            return self._read(as_repacked)

    def exact(self) -> Tensor:
        """As `matrix`, but in float64 where the layer holds it so: what merging adds to."""
        if self.layer.weight.dtype != torch.float64:
            return self.matrix()
        with brought(self.layer):
            return self._read(False, torch.float64)

    def _read(self, as_repacked: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        weight: Any = self.layer.weight if self._gathered is None else self._gathered
        if self._scales is not None:
            weight = FourBit(self._nibbles(weight), self._scales).matrix(as_repacked)
        elif _is_8bit(self.layer):
            weight = _dequantized_8bit(self.layer)
        elif self.backend is not None:
            weight = self.backend.get_base_weight(self.layer)
        weight = whole(weight).detach().to(dtype)
        if self.correction is not None:
            weight = weight + self._correction(weight.device).lowrank().dense()
        return weight.T if self.transposed else weight

    def apply(self, x: Tensor) -> Tensor:
        """W x, without the bias, W as it reads back after repacking: quantised layers round products, or quantise x."""
        if self.backend is not None:
            return _Apply.apply(x, self)
        with brought(self.layer):
            weight: Any = self.layer.weight
            return F.linear(x.to(weight.dtype), weight.T if self.transposed else weight)

    def ready(self, training: bool) -> None:
        """Before each pass through the layer: `unpack` in training, or where it only has a copy of parts for the pass.

        Raises:
            ValueError: an 8-bit layer under FSDP2.
        """
        weight = self.layer.weight
        if _is_8bit(self.layer) and not hasattr(weight, "SCB"):
            raise ValueError(
                f"{self.name}: an 8-bit weight cannot be in parts under FSDP2 (fully_shard): bitsandbytes keeps its "
                "scales on the weight, and FSDP2 makes another one. Load the base in 4 bits, or train it under DDP."
            )
        if training or in_zero3(weight) or (self._scales is not None and state_of(weight) is None):
            self.unpack()

    def keep(self) -> None:
        """Remembers the scales of a 4-bit weight as they are now, unless those from before any repacking are known."""
        if _kept_scales(self.layer) is None:
            kept[self.layer] = (weakref.ref(self.layer.weight), self._scales)  # type: ignore[arg-type]

    def unpack(self) -> None:
        """Puts a 4-bit weight back to the bits it had when it was wrapped, if bitsandbytes has repacked it since.

        What processes hold in parts is never repacked, only its copy for one pass; the scales are, and are put back.
        """
        if self._scales is None:
            return
        weight: Any = self.layer.weight
        if weight.is_meta or weight.device != self._scales.absmax.device:
            return
        if state_of(weight) is None:  # FSDP2 made another parameter of it; bitsandbytes takes the layer's scales then
            self.layer.quant_state = copy.copy(self._scales)
        elif weight.quant_state.absmax is not self._scales.absmax:
            weight.data = unpacked(weight.data, weight.quant_state)
            weight.quant_state = copy.copy(self._scales)

    def overwrite(self, weight: Tensor, owner: Any) -> Tensor | Quantised:
        """Stores an (out, in) matrix in the layer's own format, and returns the original for `restore`."""
        weight = weight.T if self.transposed else weight
        if self.backend is None:
            with brought(self.layer, to_write=True):
                original = self.layer.weight.detach().to("cpu", copy=True)
                self.layer.weight.data.copy_(weight)
            return original
        state: Any = self.layer.state if _is_8bit(self.layer) else None  # it takes the quantised weight over
        taken = None if state is None else (state.CB, state.SCB)
        stored = Quantised(self.layer.weight, self._scales, taken, self.correction)
        self.backend.set_base_weight(owner, weight)
        self._scales, self.correction = self._current_scales(), None
        return stored

    def restore(self, original: Tensor | Quantised) -> None:
        """Puts back what `overwrite` returned, bit for bit."""
        if not isinstance(original, Quantised):
            with brought(self.layer, to_write=True):
                self.layer.weight.data.copy_(original)
            return
        self.layer.weight, self._scales, taken, self.correction = original
        if taken is not None:
            self.layer.state.CB, self.layer.state.SCB = taken

    def corrected(self, result: Tensor, x: Tensor) -> Tensor:
        """The layer's output (..., m) for x, with what the correction adds."""
        return result if self.correction is None else self._correction(x.device)(x, result)

    def four_bits(self) -> FourBit | None:
        """What the layer holds, if it is a 4-bit one."""
        return None if self._scales is None else FourBit(self._nibbles(self.layer.weight), self._scales)

    def replace(self, held: FourBit, correction: Product | None) -> None:
        """Makes the weight `held` plus a correction; `undo` takes it back."""
        if self.first is None and (first := self.four_bits()) is not None:
            self.first = first.to("cpu")
        self._put(held)
        self.correction = correction

    def undo(self) -> None:
        """Puts back what the layer held before `replace`, bit for bit."""
        if self.first is not None and self.correction is not None:
            self._put(self.first)
            self.first = self.correction = None

    def _put(self, held: FourBit) -> None:
        weight: Any = self.layer.weight
        weight.data, self._scales = held.to(weight.device)
        weight.quant_state = self.layer.quant_state = copy.copy(self._scales)
        kept[self.layer] = (weakref.ref(weight), self._scales)

    def _correction(self, device: torch.device) -> Product:
        """On a device, where it stays: no module holds it, so that it is never cast, sharded or saved with a model."""
        product: Any = self.correction
        if product.up.device != device:
            product = self.correction = Product(product.up.to(device), None, product.down.to(device))
        return product

    def _current_scales(self) -> Any:
        """The state of a 4-bit weight in its unpacked form, or None. Packing keeps bfloat16 scales, transposed."""
        state: Any = copy.copy(state_of(getattr(self.layer, "weight", None)))
        if packed(state):
            state.absmax = state.absmax.T.reshape(-1).float()
            state.dtype, state.packing_format_for_cpu = state.original_dtype, False
        return state

    def _nibbles(self, weight: Any) -> Tensor:
        """Unpacked and whole; of the layer's weight, or of what `gathered` has of it."""
        return unpacked(whole(weight).data, state_of(self.layer.weight))


def _is_8bit(layer: Any) -> bool:
    return hasattr(getattr(layer, "state", None), "SCB")  # bitsandbytes' own, not what another layer calls so


def _dequantized_8bit(layer: Any) -> Tensor:
    """As PEFT reads it, in terms that torch.compile can trace (not the weight's class), and writing nothing."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return int8_vectorwise_dequant(layer.weight.data, scales.to(layer.weight.device))


class _Apply(torch.autograd.Function):
    """W x for a quantised W, read again for the backward pass: the graph of a model would hold all of it otherwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: BaseWeight) -> Tensor:  # type: ignore[override]
        ctx.base = base
        return F.linear(x, base.matrix(as_repacked=True).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.base.matrix(as_repacked=True).to(gradient.dtype), None


# The scales of 4-bit weights from before any repacking, with the weight they belong to.
kept: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def _kept_scales(layer: nn.Module) -> Any:
    weight, scales = kept.get(layer, (lambda: None, None))
    return copy.copy(scales) if weight() is not None and weight() is getattr(layer, "weight", None) else None
