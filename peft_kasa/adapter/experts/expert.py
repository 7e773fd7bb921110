"""One expert of a stack, as a layer of the family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..base.sharding import in_zero3
from ..layer import SpectralLinear
from ..slots import through_base

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ExpertWeight(nn.Module):
    """One matrix of a stacked parameter, as the base layer of a `SpectralExpert`: a view, which holds nothing.

    Args:
        owner: the experts' module.
        parameter: the name of its parameter, (experts, out, in), or (experts, in, out) where the owner's
            `is_transposed` says so.
        index: which expert.
    """

    bias = None

    def __init__(self, owner: nn.Module, parameter: str, index: int) -> None:
        super().__init__()
        self.owner = (owner,)  # in a tuple, so that it is no child of its own part
        self.parameter, self.index = parameter, index
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:
        """(out, in)."""
        matrix = getattr(self.owner[0], self.parameter)[self.index]
        return matrix.T if is_transposed(self.owner[0]) else matrix

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class SpectralExpert(SpectralLinear):
    """The adapters of one expert's matrix. It is not called: `SpectralExperts` calls the experts, all together.

    Args:
        base_layer: its matrix.
        parameter: the full name of the stacked parameter: what patterns of a config are matched with. The expert's own
            name, in errors and seeds, is that and its number.
    """

    def __init__(self, base_layer: ExpertWeight, parameter: str) -> None:
        super().__init__(base_layer, f"{parameter}.{base_layer.index}")
        self.pattern_name = parameter

    @property
    def stored(self) -> Tensor:
        """The stack: of one in parts, taking a matrix is a collective."""
        weight: Any = self.base_layer
        return getattr(weight.owner[0], weight.parameter)


def joint(experts: list[SpectralExpert], adapters: list[str]) -> tuple[Tensor, Tensor]:
    """The whole update of these adapters in each expert of a stack, computed for all at once.

    Returns:
        B (experts, m, k) and A (experts, k, n), float32.
    """
    every = [{name: expert.slots(name) for name in adapters} for expert in experts]
    stacked = {
        name: {slot: torch.stack([slots[name][slot] for slots in every]) for slot in every[0][name]}
        for name in adapters
    }
    reads = any(map(through_base, every[0].values()))
    weights = torch.stack([expert.original() for expert in experts]) if reads else None

    def one(slots: dict[str, dict[str, Tensor]], weight: Tensor | None) -> tuple[Tensor, Tensor]:
        return experts[0].joint(slots, weight).folded()

    with torch.autocast(experts[0].stored.device.type, enabled=False):
        return torch.vmap(one, in_dims=(0, 0 if reads else None))(stacked, weights)


def is_transposed(owner: nn.Module) -> bool:
    """Whether the stacks of an experts' module are (experts, in, out): transformers' mark for it, which PEFT reads."""
    return bool(getattr(owner, "is_transposed", False))


def unsupported(owner: nn.Module, parameter: str) -> str | None:
    """Why a parameter cannot be adapted as a stack of experts, or None if it can."""
    if hasattr(owner, "parametrizations"):
        return "it is a parametrization of another (bitsandbytes keeps quantised experts so). Load the experts in float"
    weight: Any = getattr(owner, parameter)
    if in_zero3(weight) or isinstance(weight, torch.distributed.tensor.DTensor):
        return "processes hold it in parts already. Call get_peft_model before the model is sharded"
    if weight.dtype not in FLOATS:
        return f"experts have to be kept in float, for the decomposition. Found {weight.dtype}: load them in float"
    if weight.ndim != 3:
        found = tuple(weight.shape)
        remedy = "name linear layers in target_modules, and routers in modules_to_save"
        return f"target_parameters takes stacks (experts, out, in) or (experts, in, out). Found {found}: {remedy}"
    return None
