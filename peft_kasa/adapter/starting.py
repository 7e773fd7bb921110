"""Gives adapters their values, over a whole model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..peft_type import PREFIX
from ..spectral import Engine
from ..spectral.checksum import checksum
from ..spectral.covariance import Covariance
from ..spectral.plan import Ask, Given, Solver
from ..spectral.sweep import Job, sweep
from .anchors import PREFIX as ANCHOR
from .base_weight import guard
from .checkpoint import left_out
from .layer import SpectralLinear


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
    method = layers[0].adapters[adapter].config.name if layers else ""

    def work(layer: SpectralLinear, engine: Solver) -> None:
        layer.begin(adapter, engine)

    results = {layer: list(layer.slots(adapter).values()) for layer in layers}
    sweep(_jobs(results, adapter, work), f"{method}: decomposing")
    for layer in layers:
        layer.remember(adapter)  # those that another rank computed too


def frames(layers: dict[str, SpectralLinear], adapter: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a compact checkpoint leaves out, by the keys it would have there, likewise. No layer is changed."""
    found: dict[str, Tensor] = {}
    saved, own = {}, {}
    for path, layer in layers.items():
        key = f"{path}.{PREFIX}frozen.{adapter}."
        saved[layer] = {name.removeprefix(key): value for name, value in state.items() if name.startswith(key + ANCHOR)}
        shapes = {slot: layer.slots(adapter)[slot].shape for slot in left_out(layer, adapter)}
        device = layer.base_layer.weight.device
        own[layer] = {slot: torch.empty(shape, dtype=torch.float32, device=device) for slot, shape in shapes.items()}
        found |= {key + slot: value for slot, value in own[layer].items()}

    def work(layer: SpectralLinear, engine: Solver) -> None:
        for slot, value in layer.frames(adapter, saved[layer], engine).items():
            own[layer][slot].copy_(value)

    sweep(_jobs({layer: list(own[layer].values()) for layer in own}, adapter, work), "computing frames")
    return found


Work: TypeAlias = Callable[[SpectralLinear, Solver], None]


def _jobs(results: dict[SpectralLinear, list[Tensor]], adapter: str, work: Work) -> list[Job]:
    """Work on each layer, given an engine. Layers whose only cut is of one kind, of small weights of one shape on CUDA,
    are one job: their cuts are computed in one batch."""
    engine, jobs = Engine(), []
    for ask, layers in _alike(list(results), adapter):
        for part in _parts(layers, ask, engine):
            run = partial(_run, part, adapter, ask, engine, work)
            jobs.append(_joined([job(layer, adapter, run, results[layer]) for layer in part]))
    return jobs


def _parts(layers: list[SpectralLinear], ask: Ask | None, engine: Engine) -> list[list[SpectralLinear]]:
    """What to decompose together, of layers on one device."""
    if ask is None:
        return [[layer] for layer in layers]
    named = {layer.name: layer for layer in layers}
    shapes = {layer.name: torch.empty(layer.out_features, layer.in_features, device="meta") for layer in layers}
    groups = replace(engine, device=layers[0].base_layer.weight.device).groups(shapes, ask.k)
    return [[named[name] for name in names] for names in groups]


def _alike(layers: list[SpectralLinear], adapter: str) -> Iterator[tuple[Ask | None, list[SpectralLinear]]]:
    """Layers by the only cut of the weight that their start takes, and by device; None where it takes another."""
    groups: dict[tuple[Ask | None, torch.device], list[SpectralLinear]] = {}
    for layer in layers:
        asks = layer.adapters[adapter].asks
        key = (asks[0] if len(asks) == 1 else None, layer.base_layer.weight.device)
        groups.setdefault(key, []).append(layer)
    return ((ask, alike) for (ask, _), alike in groups.items())


def _run(layers: list[SpectralLinear], adapter: str, ask: Ask | None, engine: Engine, work: Work) -> None:
    if ask is None or len(layers) == 1:
        work(layers[0], engine)
        return
    cuts = engine.together({layer.name: layer.source(adapter) for layer in layers}, ask.k, ask.end)
    for layer in layers:
        work(layer, Given(cuts[layer.name], ask, engine))


def _joined(jobs: list[Job]) -> Job:
    """One job for those that run as one."""
    first = jobs[0]
    if len(jobs) == 1:
        return first
    return first._replace(
        name=", ".join(job.name for job in jobs),
        results=[tensor for job in jobs for tensor in job.results],
        about=lambda: [job.about() for job in jobs],
        weights=len(jobs),
    )


def job(layer: SpectralLinear, adapter: str, work: Callable[[], None], results: list[Tensor]) -> Job:
    """Work on one layer as the sweep takes it."""
    shape, device = (layer.out_features, layer.in_features), layer.base_layer.weight.device
    return Job(layer.name, shape, device, work, results, partial(_about, layer, adapter))


def _about(layer: SpectralLinear, adapter: str) -> object:
    """All that a start follows from: the weight, the config and what was seen of data."""
    known = layer.adapters[adapter]
    settings = {key: repr(value) for key, value in known.config.to_dict().items() if not isinstance(value, set | dict)}
    weight = layer.base.matrix()
    evidence = layer.site(adapter, weight, Engine()).evidence
    seen = evidence.triangle.packed() if isinstance(evidence, Covariance) else evidence
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
