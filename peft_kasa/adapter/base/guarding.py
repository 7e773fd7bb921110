"""4-bit layers that no adapter wraps, beside some that are wrapped."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base_weight import BaseWeight
from .fourbit import packed


def guard(model: nn.Module, on: bool = True) -> None:
    """Keeps 4-bit layers that no adapter wraps from what repacking does to them, as wrapped ones are (or ends it):
    gradients pass through them in training, and taking a state dict leaves them as they were.
    """
    _unhook(model._forward_pre_hooks)
    layers = [layer for layer in model.modules() if _is_4bit(layer)]
    for layer in layers:
        _unhook(layer._state_dict_hooks)
        if on:
            BaseWeight(layer).keep()
            layer.register_state_dict_post_hook(_after_state_dict)
    if on and layers:
        model.register_forward_pre_hook(_before_forward)


def _unhook(hooks: Any) -> None:
    for key in [key for key, hook in hooks.items() if hook in (_before_forward, _after_state_dict)]:
        del hooks[key]


def _before_forward(model: nn.Module, _: Any) -> None:
    if model.training:
        for layer in model.modules():
            if _is_4bit(layer) and packed(layer.weight.quant_state):
                BaseWeight(layer).unpack()


def _after_state_dict(layer: nn.Module, *_: Any) -> None:
    BaseWeight(layer).unpack()


def _is_4bit(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and hasattr(layer.weight, "quant_state")
