"""Gives adapters their values, over a whole model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from ..peft_type import PREFIX
from ..spectral import Engine
from ..spectral.checksum import checksum
from ..spectral.covariance import Covariance
from ..spectral.sweep import Job, sweep
from .anchors import PREFIX as ANCHOR
from .base_weight import guard
from .checkpoint import left_out
from .layer import SpectralLinear
from .sharding import in_parts

TOGETHER = 8  # weights in parts that are put together at a time: about a block's


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


def begin(layers: list[SpectralLinear], adapter: str) -> None:
    """Runs the method's start in each layer: several at a time, shared between ranks, behind a progress bar."""
    engine = Engine()
    method = layers[0].adapters[adapter].config.name if layers else ""
    jobs = [
        job(layer, adapter, partial(layer.begin, adapter, engine), list(layer.slots(adapter).values()))
        for layer in layers
    ]
    run(layers, jobs, f"{method}: decomposing")
    for layer in layers:
        layer.remember(adapter)  # those that another rank computed too


def frames(layers: dict[str, SpectralLinear], adapter: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a compact checkpoint leaves out, by the keys it would have there, likewise. No layer is changed."""
    engine, jobs = Engine(), []
    found: dict[str, Tensor] = {}
    for path, layer in layers.items():
        key = f"{path}.{PREFIX}frozen.{adapter}."
        saved = {name.removeprefix(key): value for name, value in state.items() if name.startswith(key + ANCHOR)}
        shapes = {slot: layer.slots(adapter)[slot].shape for slot in left_out(layer, adapter)}
        device = layer.base_layer.weight.device
        own = {slot: torch.empty(shape, dtype=torch.float32, device=device) for slot, shape in shapes.items()}
        found |= {key + slot: value for slot, value in own.items()}
        jobs.append(job(layer, adapter, partial(_copy_frames, layer, adapter, saved, engine, own), list(own.values())))
    run(list(layers.values()), jobs, "computing frames")
    return found


def _copy_frames(
    layer: SpectralLinear, adapter: str, saved: dict[str, Tensor], engine: Engine, into: dict[str, Tensor]
) -> None:
    for slot, value in layer.frames(adapter, saved, engine).items():
        into[slot].copy_(value)


def job(layer: SpectralLinear, adapter: str, work: Callable[[], None], results: list[Tensor]) -> Job:
    """Work on one layer as the sweep takes it."""
    shape, device = (layer.out_features, layer.in_features), layer.base_layer.weight.device
    return Job(layer.name, shape, device, work, results, partial(_about, layer, adapter))


def run(layers: list[SpectralLinear], jobs: list[Job], title: str) -> None:
    """Runs a job for each layer. Weights that processes hold in parts are put together for it, a few at a time."""
    divided = any(in_parts(layer.base_layer.weight) for layer in layers)
    step = TOGETHER if divided else max(len(jobs), 1)
    for first in range(0, max(len(jobs), 1), step):
        with ExitStack() as stack:
            for layer in layers[first : first + step]:
                stack.enter_context(layer.base.gathered())
            sweep(jobs[first : first + step], title)


def _about(layer: SpectralLinear, adapter: str) -> object:
    """All that a start follows from: the weight, the config and what was seen of data."""
    known = layer.adapters[adapter]
    settings = {key: repr(value) for key, value in known.config.to_dict().items() if not isinstance(value, set | dict)}
    weight = layer.base.matrix()
    evidence = layer.site(adapter, weight, Engine()).evidence
    seen = evidence.scatter if isinstance(evidence, Covariance) else evidence
    return checksum(weight), known.rank, known.scale, settings, None if seen is None else checksum(seen)


def settle(model: nn.Module, needed: Collection[str] = ()) -> None:
    """Makes sure that every adapter has values: its file's, or else its method's start.

    Raises:
        ValueError: a needed one has to be calibrated first. Others are left as they are.
    """
    for layer in all_layers(model):
        for adapter, known in layer.adapters.items():
            if adapter in needed or not known.uncalibrated:
                layer.settle(adapter)


def withdraw(model: nn.Module, adapter: str) -> None:
    """Takes an adapter out again, and its config with it."""
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter, None)
    if not configs:
        for module in model.modules():
            module.__dict__.pop("peft_config", None)
    take_out(model, adapter, list(all_layers(model)))
    if not any(all_layers(model)):
        guard(model, False)


def take_out(model: nn.Module, adapter: str, layers: list[SpectralLinear]) -> None:
    """Takes an adapter out of these layers; those that have no other become the base layers they were."""
    paths = {id(module): path for path, module in model.named_modules()}
    for layer in layers:
        if adapter in layer.adapters:
            layer.forget(adapter)
        if not layer.adapters:
            parent, _, child = paths[id(layer)].rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
