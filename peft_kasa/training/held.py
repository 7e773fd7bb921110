"""The parameters that an optimiser steps, in whatever form it has them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Held:
    """What an optimiser holds: parameters, or the flat tensors of DeepSpeed ZeRO, which have a part of each.

    ZeRO hands its gradients to the optimiser inside it after it has averaged, unscaled and clipped them.

    Examples:
        >>> import torch
        >>> from peft_kasa.training.held import Held
        >>> layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> held = Held(torch.optim.SGD(layer.parameters(), lr=0.1))
        >>> layer.weight in held, other.weight in held
        (True, False)
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._tensors = {id(tensor): tensor for group in optimizer.param_groups for tensor in group["params"]}

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._tensors or self._place(parameter) is not None

    def add_to_flat(self, parameter: Tensor, gradient: Tensor) -> bool:
        """Adds to the gradient of the flat tensor that has a part of this parameter. False: there is none."""
        place = self._place(parameter)
        if place is None:
            return False
        flat, at, begin, size = place
        part = gradient.flatten()[begin : begin + size]  # the last one may be padded
        if flat.grad is not None:
            flat.grad[at : at + len(part)] += part.to(flat.grad)
        return True

    def _place(self, parameter: Tensor) -> tuple[Tensor, int, int, int] | None:
        """The flat tensor, where the part begins in it and in the parameter, and its size."""
        found = _part(parameter)
        if found is None:
            return None
        begin, part = found
        for flat in self._tensors.values():
            if isinstance(flat, DTensor):  # another model's, under FSDP2: it has no storage to compare
                continue
            if flat.untyped_storage().data_ptr() == part.untyped_storage().data_ptr():
                return flat, part.storage_offset() - flat.storage_offset(), begin, part.numel()
        return None


def stepped_by_zero(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO steps this parameter, in this process or in another."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")


def _part(parameter: Any) -> tuple[int, Tensor] | None:
    """Where this process's part begins in the flattened parameter, and the part itself: a view of a flat tensor."""
    if hasattr(parameter, "_z3_optimizer"):
        zero = parameter._z3_optimizer
        group, at, size = zero.grad_position[zero.get_param_id(parameter)]
        begin = dist.get_rank(parameter.ds_process_group) * parameter.ds_tensor.ds_numel
        return begin, zero.fp32_partitioned_groups_flat[group].detach()[at : at + size]
    mapping = getattr(parameter, "_hp_mapping", None)  # ZeRO-1 and -2
    return None if mapping is None else (mapping.lp_fragment_address.start, mapping.hp_fragment)
