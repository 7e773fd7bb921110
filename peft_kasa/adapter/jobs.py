"""Work on many layers of a model, as the sweep takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ..spectral import Engine
from ..spectral.checksum import checksum
from ..spectral.covariance import Covariance
from ..spectral.plan import Ask, Given, Solver
from ..spectral.sweep import Job, sweep
from .base.sharding import in_parts
from .layer import SpectralLinear

TOGETHER = 8  # weights in parts that are put together at a time: about a block's
Work: TypeAlias = Callable[[SpectralLinear, Solver], None]
Task: TypeAlias = tuple[list[SpectralLinear], Job]  # the layers whose weights a job reads


def planned(results: dict[SpectralLinear, list[Tensor]], adapter: str, work: Work) -> list[Task]:
    """Work on each layer, given an engine. Layers whose only cut is of one kind, of small weights of one shape on CUDA,
    are one job: their cuts are computed in one batch."""
    engine, jobs = Engine(), list[Task]()
    for ask, layers in _alike(list(results), adapter):
        for part in _parts(layers, ask, engine):
            do = partial(_run, part, adapter, ask, engine, work)
            jobs.append((part, _joined([job(layer, adapter, do, results[layer]) for layer in part])))
    return jobs


def _parts(layers: list[SpectralLinear], ask: Ask | None, engine: Engine) -> list[list[SpectralLinear]]:
    """What to decompose together, of layers on one device."""
    if ask is None:
        return [[layer] for layer in layers]
    named = {layer.name: layer for layer in layers}
    shapes = {layer.name: torch.empty(layer.out_features, layer.in_features, device="meta") for layer in layers}
    groups = replace(engine, device=layers[0].base.device).groups(shapes, ask.k)
    return [[named[name] for name in names] for names in groups]


def _alike(layers: list[SpectralLinear], adapter: str) -> Iterator[tuple[Ask | None, list[SpectralLinear]]]:
    """Layers by the only cut of the weight that their start takes, and by device; None where it takes another."""
    groups: dict[tuple[Ask | None, torch.device], list[SpectralLinear]] = {}
    for layer in layers:
        asks = layer.adapters[adapter].asks
        key = (asks[0] if len(asks) == 1 else None, layer.base.device)
        groups.setdefault(key, []).append(layer)
    return ((ask, alike) for (ask, _), alike in groups.items())


def _run(layers: list[SpectralLinear], adapter: str, ask: Ask | None, engine: Engine, work: Work) -> None:
    if ask is None or len(layers) == 1:
        work(layers[0], engine)
        return
    weights = {layer.name: layer.source(adapter) for layer in layers}
    cuts = engine.together(weights, ask.k, ask.end)
    for layer in layers:
        work(layer, Given(weights[layer.name], cuts[layer.name], ask, engine))


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
    shape, device = (layer.out_features, layer.in_features), layer.base.device
    return Job(layer.name, shape, device, work, results, partial(_about, layer, adapter))


def run(work: Sequence[Task], title: str) -> None:
    """Runs the jobs. Weights that processes hold in parts are put together for them, a few at a time."""
    divided = any(in_parts(layer.stored) for layers, _ in work for layer in layers)
    step = TOGETHER if divided else max(len(work), 1)
    for first in range(0, max(len(work), 1), step):
        part = work[first : first + step]
        with ExitStack() as stack:
            for layer in (layer for layers, _ in part for layer in layers):
                stack.enter_context(layer.base.gathered())
            sweep([job for _, job in part], title)


def _about(layer: SpectralLinear, adapter: str) -> object:
    """All that a start follows from: the weight, the config and what was seen of data."""
    known = layer.adapters[adapter]
    settings = {key: repr(value) for key, value in known.config.to_dict().items() if not isinstance(value, set | dict)}
    weight = layer.base.matrix()
    evidence = layer.site(adapter, weight, Engine()).evidence
    seen = evidence.triangle.packed() if isinstance(evidence, Covariance) else evidence
    return checksum(weight), known.rank, known.scale, settings, None if seen is None else checksum(seen)
