"""How many of its triples each module is given: what `rank_budget` asks for, written into rank_pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..spectral import Engine
from .filling import given_rank
from .jobs import job, run
from .keys import FROZEN, LEARNT, slot_key
from .layer import SpectralLinear
from .naming import exactly, target
from .starting import layers_of, named_layers, start_layers, take_out


def start_adapter(model: nn.Module, adapter: str, again: bool = False) -> None:
    """Gives all modules of an adapter their ranks and their start; `again`, ranks that were chosen before as well."""
    layers = list(layers_of(model, adapter))
    if any(layer.on_meta(adapter) for layer in layers):
        _refuse_to_choose(layers, adapter)
        layers = []  # other ranks may have the weights: this one says that it has none
    elif layers and layers[0].adapters[adapter].config.rank_budget is not None:
        spend(model, adapter, again)
        layers = list(layers_of(model, adapter))
    start_layers(layers, adapter)


def _refuse_to_choose(layers: list[SpectralLinear], adapter: str) -> None:
    config = layers[0].adapters[adapter].config
    missing = [layer.name for layer in layers if given_rank(config, layer.name) is None]
    if config.rank_budget is not None and missing:
        raise ValueError(
            f"{missing[0]}: rank_budget needs the base weights, which are on the meta device in this process. Choose "
            "the ranks where they are, and give the rank_pattern of that config here."
        )


def spend(model: nn.Module, adapter: str, again: bool = False) -> None:
    """Chooses the ranks of an adapter's modules, makes their slots anew, and takes it out of those that get none.

    Modules that rank_pattern names have their ranks already: all of them where the config is that of a saved adapter,
    or of one beside which a copy is made. The config is told: ranks go to its rank_pattern, and if modules are left
    out, its target_modules name the others.
    """
    layers = list(layers_of(model, adapter))
    config: Any = layers[0].adapters[adapter].config
    before, modules = getattr(config, "before_budget", (config.rank_pattern, len(layers)))
    if again:
        if modules > len(layers):
            raise ValueError(
                f"The ranks of adapter {adapter!r} were chosen before, and {modules - len(layers)} modules left out. "
                "Add another adapter, with a new config, to choose again."
            )
        config.rank_pattern = before
    open_ones = [layer for layer in layers if given_rank(config, layer.name) is None]
    if not open_ones:
        return
    ranks = allocate(_shares(open_ones, adapter), config.rank_budget, config.r or 0)
    _choose(config, model, adapter, {layer: ranks[layer.name] for layer in open_ones})


def adopt(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> None:
    """Takes the ranks from an adapter's file, where they are yet to be chosen: a run that goes on has no statistics."""
    named = dict(named_layers(model, adapter))
    if not named or not all(layer.adapters[adapter].awaiting for layer in named.values()):
        return
    config = next(iter(named.values())).adapters[adapter].config
    if config.rank_budget is None or all(given_rank(config, layer.name) for layer in named.values()):
        return
    ranks = {}
    for path, layer in named.items():
        sides = (slot_key(path, kind, adapter, name) for kind in (LEARNT, FROZEN) for name in ("right", "right0"))
        ranks[layer] = next((len(state[key]) for key in sides if key in state), 0)
    if any(ranks.values()):
        _choose(config, model, adapter, ranks)


def _choose(config: Any, model: nn.Module, adapter: str, ranks: dict[SpectralLinear, int]) -> None:
    """Makes these the ranks of the adapter's modules; those of rank 0 lose it."""
    layers = list(layers_of(model, adapter))
    config.before_budget = (config.rank_pattern, len(layers))
    names = [layer.name for layer in layers]
    chosen = {exactly(layer.name, names): rank for layer, rank in ranks.items() if rank}
    config.rank_pattern = chosen | config.rank_pattern
    without = [layer for layer, rank in ranks.items() if not rank]
    kept = [layer for layer in layers if layer not in without]
    if without:
        target(config, model, {layer.name for layer in kept})
        take_out(model, adapter, without)
    for layer in kept:
        trains = any(slot.requires_grad for slot in layer.peft_kasa_learnt[adapter].parameters())
        layer.reserve(adapter, config)
        layer.peft_kasa_learnt[adapter].requires_grad_(trains)
        layer.adapters[adapter].peers = len(kept)


def allocate(shares: dict[str, Tensor], budget: str | float, r: int) -> dict[str, int]:
    """The rank of each module from what its triples hold of the whole, in descending order.

    Args:
        shares: by module, (k,); no module gets more than k.
        budget: "variance": the r * len(shares) largest of all shares win, a tie goes to the module that comes first. A
            number: the smallest rank that holds so much, at least 1.
        r: the mean rank for "variance".

    Examples:
        >>> import torch
        >>> from peft_kasa.adapter.budget import allocate
        >>> shares = {"q": torch.tensor([0.9, 0.05]), "k": torch.tensor([0.5, 0.3])}
        >>> allocate(shares, "variance", 1), allocate(shares, 0.75, 1)
        ({'q': 1, 'k': 1}, {'q': 1, 'k': 2})
    """
    if budget != "variance":
        threshold = float(budget)
        return {name: min(int((share.cumsum(0) < threshold).sum()) + 1, len(share)) for name, share in shares.items()}
    every = torch.cat([share.double().cpu() for share in shares.values()])
    owner = torch.cat([torch.full((len(share),), index) for index, share in enumerate(shares.values())])
    chosen = owner[every.argsort(descending=True, stable=True)[: r * len(shares)]]
    counts = torch.bincount(chosen, minlength=len(shares)).tolist()
    return dict(zip(shares, counts, strict=True))


def _shares(layers: list[SpectralLinear], adapter: str) -> dict[str, Tensor]:
    config, engine = layers[0].adapters[adapter].config, Engine()
    found, jobs = {}, []
    for layer in layers:
        size = min(layer.out_features, layer.in_features)
        most = min(math.floor(config.rank_spread * (config.r or size)), size)
        found[layer.name] = torch.zeros(most, dtype=torch.float64)
        work = partial(_measure, layer, adapter, engine, found[layer.name])
        jobs.append(([layer], job(layer, adapter, work, [found[layer.name]])))
    run(jobs, f"{config.name}: choosing ranks")
    return found


def _measure(layer: SpectralLinear, adapter: str, engine: Engine, shares: Tensor) -> None:
    shares.copy_(layer.shares(adapter, len(shares), engine))
