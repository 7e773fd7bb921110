"""Gives adapters their values, over a whole model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

from torch import Tensor, nn

from ..spectral import Engine
from ..spectral.checksum import checksum
from ..spectral.covariance import Covariance
from ..spectral.sweep import Job, sweep
from .base_weight import guard
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
    _sweep(layers, adapter, SpectralLinear.begin, "decomposing")
    for layer in layers:
        layer.adapters[adapter].awaiting = False  # those that another rank computed too


def rebuild(layers: list[SpectralLinear], adapter: str) -> None:
    """Computes what a compact checkpoint leaves out in each layer, likewise. The anchors have their values by now."""
    _sweep(layers, adapter, SpectralLinear.rebuild, "computing frames")


def _sweep(layers: list[SpectralLinear], adapter: str, work: Callable[..., None], title: str) -> None:
    engine = Engine()
    method = layers[0].adapters[adapter].config.name if layers else ""
    jobs = [
        job(layer, adapter, partial(work, layer, adapter, engine), list(layer.slots(adapter).values()))
        for layer in layers
    ]
    sweep(jobs, f"{method}: {title}")


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
