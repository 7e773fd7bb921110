"""The float weights that a quantised model was made from: read one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...methods.method import require

Weights: TypeAlias = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


def reader(weights: Weights, names: list[str]) -> Callable[[str], Tensor]:
    """What gives the weight (out, in) of a module by its name.

    Args:
        weights: a float copy of the model, its state dict, or the folder of its safetensors files.
        names: the modules that will be asked for.

    Raises:
        ValueError: it lacks one of them, or does not hold it in float.
    """
    if isinstance(weights, nn.Module):
        modules = dict(weights.named_modules())
        _check_names(names, set(modules), "the float model has no module of this name")
        return lambda name: _checked(name, _of_module(modules[name]))
    if isinstance(weights, Mapping):
        _check_names(names, {_module(key) for key in weights}, "the state dict has no weight of this module")
        return lambda name: _checked(name, weights[f"{name}.weight"])
    files = {key: path for path in sorted(Path(weights).glob("*.safetensors")) for key in _keys(path)}
    require(bool(files), "weights has to be a model, a state dict or a folder with safetensors files", weights)
    _check_names(names, {_module(key) for key in files}, f"{weights} has no weight of this module")
    return lambda name: _checked(name, _read(files[f"{name}.weight"], f"{name}.weight"))


def _check_names(names: list[str], held: set[str], reason: str) -> None:
    if missing := [name for name in names if name not in held]:
        raise ValueError(
            f"{missing[0]}: {reason} ({len(missing)} of {len(names)} missing). Pass the float weights of the model "
            "that was quantised, as the same class loads them."
        )


def _module(key: str) -> str:
    return key.removesuffix(".weight") if key.endswith(".weight") else ""


def _of_module(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr, operator, assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def _keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _read(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        found: Tensor = file.get_tensor(key)
        return found


def _checked(name: str, weight: Tensor) -> Tensor:
    require(weight.is_floating_point(), f"{name}: the weight has to be in float, before quantisation", weight.dtype)
    return weight.detach().to(torch.float32)
