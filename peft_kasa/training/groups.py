"""Parameter groups by slot, so that an optimiser can give cores another learning rate than frames."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import nn

from ..adapter.slots import LEARNABLE
from ..adapter.starting import adapter_names, all_layers, layers_of, settle
from ..methods.method import require

OTHER, UNDECAYED = "other", "other, no decay"


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    left_lr: float | None = None,
    core_lr: float | None = None,
    right_lr: float | None = None,
    other_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """All that learns in a model, as a torch optimiser's groups: one for each slot, and one for all else.

    Singular values and other cores want larger steps than frames do: often 1e-2 to 5e-2 where frames want 1e-4. The
    groups go into any optimiser: `Trainer(..., optimizers=(AdamW(parameter_groups(model, ...)), None))`.

    Args:
        model: a model with adapters of the family, wherever they are in it.
        lr: the learning rate of whatever has none of its own below.
        left_lr: that of L (m, k). As the next two, not used where a method does not train that slot.
        core_lr: that of C, (k,) or (k, k).
        right_lr: that of R (k, n).
        other_lr: that of all else that learns: modules_to_save, heads, adapters of other PEFT methods.
        weight_decay: of all groups. Biases and norms outside the family have none, as in transformers' Trainer.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and a `name`: "left", "core", "right", "other" and "other, no decay",
        in this order, those that would be empty left out. Each parameter that learns is in one group, once.

    Raises:
        TypeError: `model` is not a module (it may be a trainer).
        ValueError: a rate is not a finite number above 0, the decay is below 0, no slot of the family learns in this
            model, or an adapter that learns has not been calibrated.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_kasa import KaSAConfig, parameter_groups
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), KaSAConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4, core_lr=1e-2))
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('left', 0.0001), ('core', 0.01), ('right', 0.0001)]
    """
    rates = {"lr": lr, "left_lr": left_lr, "core_lr": core_lr, "right_lr": right_lr, "other_lr": other_lr}
    _check(model, rates, weight_decay)
    settle(model, {name for layer in all_layers(model) for name in layer.adapters if layer.learning(name)})
    groups = []
    for name, parameters in _by_group(model).items():
        own = rates[f"{name.partition(',')[0]}_lr"]
        decay = 0.0 if name == UNDECAYED else weight_decay
        groups.append(
            {"name": name, "params": parameters, "lr": float(lr if own is None else own), "weight_decay": decay}
        )
    return groups


def _check(model: nn.Module, rates: dict[str, float | None], weight_decay: float) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` has to be a torch module. Found {type(model).__name__}: of a trainer, give its `.model`."
        )
    for name, rate in rates.items():
        optional = rate is None and name != "lr"
        require(optional or (_is_number(rate) and rate > 0), f"{name} has to be a finite number above 0", rate)  # type: ignore[operator]
    holds = _is_number(weight_decay) and weight_decay >= 0
    require(holds, "weight_decay has to be a finite number of at least 0", weight_decay)
    if not any(layer.learning(name) for name in adapter_names(model) for layer in layers_of(model, name)):
        raise ValueError(
            "`model` has to have an adapter of peft_kasa that learns. Found none: load adapters with "
            "is_trainable=True, or make one active with set_adapter."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _by_group(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What learns, by the name of its group, in the order of the groups: a checkpoint of an optimiser rests on it."""
    slots = {
        id(value): slot
        for layer in all_layers(model)
        for adapter in layer.adapters
        for slot, value in layer.slots(adapter).items()
    }
    undecayed = _undecayed(model)
    found: dict[str, list[nn.Parameter]] = {name: [] for name in (*LEARNABLE, OTHER, UNDECAYED)}
    for parameter in model.parameters():  # each once, also where modules share it
        if parameter.requires_grad:
            rest = UNDECAYED if id(parameter) in undecayed else OTHER
            found[slots.get(id(parameter), rest)].append(parameter)
    return {name: parameters for name, parameters in found.items() if parameters}


def _undecayed(model: nn.Module) -> set[int]:
    """Biases, and all that a normalisation learns."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if "bias" in name or "norm" in type(module).__name__.lower()
    }
