"""Gives adapters their values, over a whole model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ..methods.method import SpectralConfig, require
from ..spectral.plan import Solver
from .base.guarding import guard
from .before import restore
from .experts.expert import SpectralExpert
from .experts.wrapper import tidy
from .files.anchors import ANCHOR
from .files.checkpoint import left_out
from .jobs import planned, run
from .keys import FROZEN, slot_key
from .layer import SpectralLinear, living


def all_layers(model: nn.Module) -> Iterator[SpectralLinear]:
    """The layers of the family in a model."""
    return (module for module in model.modules() if isinstance(module, SpectralLinear))


def named_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, SpectralLinear]]:
    """The layers of a model that have this adapter, with their paths in it."""
    return (
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, SpectralLinear) and adapter in layer.adapters
    )


def layers_of(model: nn.Module, adapter: str) -> Iterator[SpectralLinear]:
    """The layers of a model that have this adapter."""
    return (layer for _, layer in named_layers(model, adapter))


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the family's adapters in a model, sorted.

    Raises:
        ValueError: there are none.
    """
    known = sorted({name for layer in all_layers(model) for name in layer.adapters})
    if not known:
        raise ValueError("The model has no adapter of peft_kasa: wrap it with get_peft_model first.")
    return known


def adapted(model: nn.Module, adapter: str) -> dict[str, SpectralLinear]:
    """The layers that have this adapter, with values, by name.

    Raises:
        ValueError: there are none.
    """
    known = adapter_names(model)
    require(adapter in known, f"adapter has to be one of the family's in this model: {known}", adapter)
    settle(model, [adapter])
    return {layer.name: layer for layer in layers_of(model, adapter)}


def start_layers(layers: list[SpectralLinear], adapter: str) -> None:
    """Runs the method's start in each layer: several at a time, shared between ranks, behind a progress bar."""
    method = layers[0].adapters[adapter].config.name if layers else ""

    def work(layer: SpectralLinear, engine: Solver) -> None:
        layer.start(adapter, engine)

    results = {layer: list(layer.slots(adapter).values()) for layer in layers}
    run(planned(results, adapter, work), f"{method}: decomposing")
    for layer in layers:
        layer.remember(adapter)  # those that another rank computed too
    _caution(layers, adapter)


def _caution(layers: list[SpectralLinear], adapter: str) -> None:
    known = ((layer, layer.adapters[adapter]) for layer in layers)
    texts = (each.config.caution(layer.out_features, layer.in_features, each.rank) for layer, each in known)
    for text in dict.fromkeys(filter(None, texts)):
        warnings.warn(text, stacklevel=2)


def frames(layers: dict[str, SpectralLinear], adapter: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a compact checkpoint leaves out, by the keys it would have there, likewise. No layer is changed."""
    found: dict[str, Tensor] = {}
    saved, own = {}, {}
    for path, layer in layers.items():
        key = slot_key(path, FROZEN, adapter)
        saved[layer] = {name.removeprefix(key): value for name, value in state.items() if name.startswith(key + ANCHOR)}
        shapes = {slot: layer.slots(adapter)[slot].shape for slot in sorted(left_out(layer, adapter))}
        device = layer.base.device
        own[layer] = {slot: torch.empty(shape, dtype=torch.float32, device=device) for slot, shape in shapes.items()}
        found |= {key + slot: value for slot, value in own[layer].items()}

    def work(layer: SpectralLinear, engine: Solver) -> None:
        for slot, value in layer.frames(adapter, saved[layer], engine).items():
            own[layer][slot].copy_(value)

    run(planned({layer: list(own[layer].values()) for layer in own}, adapter, work), "computing frames")
    return found


def settle(model: nn.Module, needed: Collection[str] = ()) -> None:
    """Makes sure that every adapter has values: its file's, or else its method's start.

    Raises:
        ValueError: a needed one has to be calibrated first. Others are left as they are.
    """
    for layer in all_layers(model):
        for adapter, known in layer.adapters.items():
            if adapter in needed or not known.uncalibrated:
                layer.settle(adapter)


def unshared(config: SpectralConfig) -> SpectralConfig:
    """The config, or a copy where another adapter has it: each is told its own ranks and statistics."""
    taken = any(known.config is config for layer in living() for known in list(layer.adapters.values()))
    return copy.deepcopy(config) if taken else config  # statistics stay the same object


def give_up(model: nn.Module, adapter: str) -> None:
    """Withdraws an adapter that has no values yet, its file having been refused."""
    if any(layer.adapters[adapter].awaiting for layer in layers_of(model, adapter)):
        withdraw(model, adapter)


def withdraw(model: nn.Module, adapter: str) -> None:
    """Takes an adapter out again, and its config with it; what PEFT froze or wrapped for it is as it was."""
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter, None)
    if not configs:
        for module in model.modules():
            for trace in ("peft_config", "_hf_peft_config_loaded"):  # the latter is transformers'
                module.__dict__.pop(trace, None)
    take_out(model, adapter, list(all_layers(model)))
    if not any(all_layers(model)):
        guard(model, False)
    restore(model, adapter)


def take_out_others(model: nn.Module, adapter: str, config: SpectralConfig) -> None:
    """Takes an adapter out of the layers that have it from another config: it was put on the same base before."""
    take_out(
        model, adapter, [layer for layer in layers_of(model, adapter) if layer.adapters[adapter].config is not config]
    )


def take_out(model: nn.Module, adapter: str, layers: list[SpectralLinear]) -> None:
    """Takes an adapter out of these layers; those that have no other become the base layers they were."""
    paths = {id(module): path for path, module in model.named_modules()}
    for layer in layers:
        if adapter in layer.adapters:
            layer.forget(adapter)
        if not layer.adapters and not isinstance(layer, SpectralExpert):
            layer.base.undo()
            parent, _, child = paths[id(layer)].rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    tidy(model)
