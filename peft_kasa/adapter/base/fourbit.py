"""What a 4-bit weight of bitsandbytes holds: nibbles and scales, as a value."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor


class FourBit(NamedTuple):
    """A matrix in 4 bits (nf4 or fp4), its block scales in 8 bits (double quantisation) or in float32."""

    nibbles: Tensor  # two entries a byte, not repacked
    scales: Any  # a QuantState, which is never written

    def matrix(self, as_repacked: bool = False) -> Tensor:
        """Dequantised, in the dtype that the state names; with the scales in bfloat16 if asked."""
        from bitsandbytes import functional as bnb

        state = self.to(self.nibbles.device).scales  # the layer may have moved, and its live state with it
        if as_repacked:
            state.absmax, state.nested = _block_scales(state).bfloat16().float(), False
        if self.runs_on:
            return _in_order(self.nibbles, state)
        return bnb.dequantize_4bit(self.nibbles, state)

    @property
    def runs_on(self) -> bool:
        """Whether blocks run on from one row into the next, which bitsandbytes' CPU kernel may misread.

        Where that kernel is used (not for all shapes) it gives the entry (i, j) of an (m, n) matrix the scale of block
        ``i * n // size + j // size``: as if every row began with a new block. Quantising, and CUDA, take blocks from
        the flat matrix, whatever its rows are.
        """
        return bool(self.scales.shape[-1] % self.scales.blocksize)

    def misreading(self) -> float:
        """How far what bitsandbytes reads here, and its layer computes with, is from the matrix, of its norm."""
        from bitsandbytes import functional as bnb

        right = self.matrix().float()
        found = bnb.dequantize_4bit(self.nibbles, self.to(self.nibbles.device).scales).float()
        return ((found - right).norm() / right.norm()).item() if right.any() else 0.0

    def quantized(self, matrix: Tensor) -> FourBit:
        """Another matrix, in the same format."""
        from bitsandbytes import functional as bnb

        old = self.scales
        nibbles, state = bnb.quantize_4bit(
            matrix.contiguous(),
            blocksize=old.blocksize,
            compress_statistics=old.nested,
            quant_type=old.quant_type,
            quant_storage=self.nibbles.dtype,
        )
        state.dtype = old.dtype
        return FourBit(nibbles, state)

    def to(self, device: torch.device | str) -> FourBit:
        """A copy of the state, on this device; tensors that are there already are shared."""
        state = copy.copy(self.scales)
        if state.nested:
            state.state2 = copy.copy(state.state2)
        if state.absmax.device != torch.device(device):
            state.to(device)
        return FourBit(self.nibbles.to(device), state)

    def tensors(self) -> dict[str, Tensor]:
        """All that differs between matrices of this format and shape, and the code that tells nf4 from fp4."""
        state = self.scales
        found = {"weight": self.nibbles, "absmax": state.absmax, "code": state.code}
        if state.nested:
            found |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
        return found

    def filled(self, tensors: dict[str, Tensor]) -> FourBit:
        """The matrix that these tensors, of the same names and shapes, hold in this format."""
        state = self.to(self.nibbles.device).scales
        state.absmax = tensors["absmax"].to(state.absmax.device)
        if state.nested:
            state.offset = tensors["offset"].to(state.offset.device)
            state.state2.absmax = tensors["nested_absmax"].to(state.state2.absmax.device)
        return FourBit(tensors["weight"].to(self.nibbles.device), state)


def _block_scales(state: Any) -> Tensor:
    """One for each block, out of their own quantisation."""
    from bitsandbytes import functional as bnb

    if not state.nested:
        return state.absmax
    return bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset


def _in_order(nibbles: Tensor, state: Any) -> Tensor:
    """The matrix, from blocks that follow one another across its rows."""
    stored = nibbles.contiguous().view(torch.uint8).flatten()
    count = state.shape.numel()
    codes = torch.stack([stored >> 4, stored & 15], dim=-1).flatten()[:count]
    scales = _block_scales(state).float().repeat_interleave(state.blocksize)[:count]
    return (state.code[codes.int()] * scales).view(state.shape).to(state.dtype)


def state_of(weight: Any) -> Any:
    """The state that bitsandbytes keeps on a 4-bit weight, or None: FSDP2 makes another parameter, without it."""
    return getattr(weight, "quant_state", None)


def packed(state: Any) -> bool:
    """Whether bitsandbytes has repacked the weight for a CPU."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def unpacked(nibbles: Tensor, state: Any) -> Tensor:
    """A column of bytes, or part of one that ZeRO-3 has put back since: that is unpacked whatever the state says."""
    if not packed(state) or nibbles.shape[-1] <= 1:
        return nibbles
    from bitsandbytes import functional as bnb

    return bnb._convert_weight_packed_for_cpu_inverse(nibbles, copy.copy(state))[0]
