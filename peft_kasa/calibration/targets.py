"""Which modules of a model a config means, found as PEFT finds them, before or after the model is wrapped."""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers, get_model_conversion_mapping
from torch import nn

from ..adapter.experts.wrapper import stacks
from ..adapter.layer import SpectralLinear
from ..adapter.supported import unsupported
from ..adapter.tuner import SpectralModel
from ..methods.method import SpectralConfig


def inner(model: nn.Module) -> nn.Module:
    """The model that PEFT has wrapped, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def targets(model: nn.Module, config: SpectralConfig) -> dict[str, nn.Module]:
    """The base layers that a config's adapter would sit on, by name, in the model's order. Changes nothing.

    Raises:
        ValueError: nothing matches, or there are no default target_modules for this architecture.
        TypeError: a target is not a layer that can be adapted.

    Examples:
        >>> import torch
        >>> from peft_kasa import PiSSAConfig
        >>> from peft_kasa.calibration.targets import targets
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> list(targets(model, PiSSAConfig(target_modules="all-linear", exclude_modules=["2"])))
        ['0']
    """
    model = inner(model)
    resolved: Any = _resolved(model, copy.deepcopy(config))
    internals = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SpectralLinear))
    internals += stacks(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not name or name.startswith(internals) or not check_target_module_exists(resolved, name):
            continue
        base = module.base_layer if isinstance(module, SpectralLinear) else module
        if reason := unsupported(base):
            raise TypeError(f"{name}: {reason}, or leave it out (target_modules, exclude_modules).")
        found[name] = base
    if not found:
        raise ValueError(
            f"`target_modules` has to match modules of the model. Found none for {config.target_modules!r}, "
            f"exclude_modules {config.exclude_modules!r}."
        )
    return found


def _resolved(model: nn.Module, config: Any) -> Any:
    """The config with names for `target_modules`."""
    facts = SpectralModel.get_model_config(model)
    if hasattr(getattr(model, "config", None), "model_type"):
        convert_peft_config_for_transformers(config, model=model, conversions=get_model_conversion_mapping(model))
    if config.target_modules is None:
        kind = facts.get("model_type")
        if (names := SpectralModel.target_module_mapping.get(kind)) is None:
            raise ValueError(f"`target_modules` is needed: PEFT has no default for model_type {kind!r}. Found None.")
        config.target_modules = names if isinstance(names, str) else set(names)
    return _maybe_include_all_linear_layers(config, model)
