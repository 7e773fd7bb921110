"""Gives adapters their values, over a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from ..spectral import Engine
from ..spectral.checksum import checksum
from ..spectral.sweep import Job, sweep
from .base_weight import guard
from .layer import SpectralLinear


def all_layers(model: nn.Module) -> Iterator[SpectralLinear]:
    """The layers of the family in a model."""
    return (module for module in model.modules() if isinstance(module, SpectralLinear))


def layers_of(model: nn.Module, adapter: str) -> Iterator[SpectralLinear]:
    """The layers of a model that have this adapter."""
    return (layer for layer in all_layers(model) if adapter in layer.adapters)


def begin(layers: list[SpectralLinear], adapter: str) -> None:
    """Runs the method's start in each layer: several at a time, shared between ranks, behind a progress bar."""
    engine = Engine()
    method = layers[0].adapters[adapter].config.name if layers else ""
    jobs = [
        Job(
            layer.name,
            (layer.out_features, layer.in_features),
            layer.base_layer.weight.device,
            partial(layer.begin, adapter, engine),
            list(layer.slots(adapter).values()),
            partial(_about, layer, adapter),
        )
        for layer in layers
    ]
    sweep(jobs, f"{method}: decomposing")
    for layer in layers:
        layer.adapters[adapter].awaiting = False  # those that another rank computed too


def _about(layer: SpectralLinear, adapter: str) -> object:
    """All that a start follows from: the weight and the config."""
    known = layer.adapters[adapter]
    settings = {key: repr(value) for key, value in known.config.to_dict().items() if not isinstance(value, set | dict)}
    return checksum(layer.base.matrix()), known.rank, known.scale, settings


def settle(model: nn.Module) -> None:
    """Makes sure that every adapter has values: its file's, or else its method's start."""
    for layer in all_layers(model):
        for adapter in layer.adapters:
            layer.settle(adapter)


def withdraw(model: nn.Module, adapter: str) -> None:
    """Takes an adapter out again; layers that have no other become the base layers they were."""
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter, None)
    if not configs:
        for module in model.modules():
            module.__dict__.pop("peft_config", None)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, SpectralLinear)]:
        if adapter in layer.adapters:
            layer.forget(adapter)
        if not layer.adapters:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    if not any(all_layers(model)):
        guard(model, False)
