"""Base weights that accelerate keeps on the CPU or on disk (`device_map="auto"`), and brings for each forward pass.

Between passes such a weight is on the meta device, behind its module's hook.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from accelerate.utils.modeling import named_module_tensors
from torch import nn

REMEDY = (
    "the base is offloaded, and loaders would offload the adapter's tensors as well. Load the base again, make the "
    "adapter with get_peft_model(base, dataclasses.replace(PeftConfig.from_pretrained(path))), and fill it with "
    "set_peft_model_state_dict(model, load_peft_weights(path))."
)


def away(layer: nn.Module) -> bool:
    """Whether the layer's weight is behind a hook now."""
    return layer.weight.is_meta and has_offloaded_params(layer)  # type: ignore[union-attr, operator]


def work_device(layer: Any) -> torch.device:
    """Where the layer computes: its weight's device, or where the hook will bring it."""
    return torch.device(layer._hf_hook.execution_device) if away(layer) else layer.weight.device


@contextmanager
def brought(layer: Any, to_write: bool = False) -> Iterator[None]:
    """Has the weight there for a while; with `to_write`, what was written is what the hook brings from then on."""
    if not away(layer):
        yield
        return
    hook = layer._hf_hook
    hook.pre_forward(layer)
    try:
        yield
        if to_write:
            hook.weights_map = {name: value.to("cpu") for name, value in named_module_tensors(layer)}
    finally:
        hook.post_forward(layer, None)


def check_not_offloaded(devices: Mapping[str, Any] | None, adapters: int) -> None:
    """Raises ValueError where PEFT's load_adapter would spread the model anew, and the adapter's tensors with it.

    Args:
        devices: the model's `hf_device_map`, if it has one.
        adapters: how many the model has: PEFT does so for the first only.
    """
    kinds = {str(device) for device in (devices or {}).values()}
    if adapters == 1 and ("disk" in kinds or ("cpu" in kinds and len(kinds) > 1)):
        raise ValueError(f"hf_device_map has {sorted(kinds)}: {REMEDY}")


def check_at_hand(layers: Iterable[Any]) -> None:
    """Raises ValueError where transformers would put what it loads of an adapter on disk, beside an offloaded base."""
    for layer in layers:
        if away(layer.base_layer):
            raise ValueError(f"{layer.name}: {REMEDY}")
