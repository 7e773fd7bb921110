"""Tensors that several processes hold in parts: FSDP2's DTensors, and DeepSpeed ZeRO-3's parameters.

Reading one as a whole is a collective: every process has to do it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together where it is in parts; itself where it is not."""
    return wholes({"": tensor})[""]


def wholes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for several. From DTensors gradients flow back; what ZeRO-3 has in parts comes as a detached copy."""
    parts = [tensor for tensor in tensors.values() if _apart(tensor)]
    copies: dict[int, Tensor] = {}
    if parts:
        from deepspeed import zero

        with zero.GatheredParameters(parts):
            copies = {id(tensor): tensor.detach().clone() for tensor in parts}
    return {name: copies.get(id(tensor), _full(tensor)) for name, tensor in tensors.items()}


def at_hand(module: nn.Module, tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Puts ZeRO-3's together for a module's forward and backward pass: for those that modules below it hold.

    From then on DeepSpeed knows that the module uses them, and does so by itself.
    """
    parts = [tensor for tensor in tensors if _apart(tensor)]
    if not parts:
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(parts, fwd_module=module)


def in_parts(tensor: Tensor) -> bool:
    """Whether processes hold the tensor in parts, though it may have been put together for now."""
    return isinstance(tensor, DTensor) or in_zero3(tensor)


def in_zero3(tensor: Tensor) -> bool:
    """Whether it is DeepSpeed ZeRO-3 that has it so."""
    return hasattr(tensor, "ds_shape")


def bare(path: str) -> str:
    """A module's path as state dicts have it: without the wrappers that FSDP1 puts between modules."""
    return path.replace("_fsdp_wrapped_module.", "")


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _apart(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has it in parts now. A repacked 4-bit weight has another shape, of as many bytes."""
    return in_zero3(tensor) and tensor.numel() != whole_shape(tensor).numel()
