"""A new adapter whose update is a weighted sum of others': what `add_weighted_adapter` does."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..methods.arguments import remedy
from ..methods.method import choice, require
from ..methods.nlora import NLoRAConfig
from ..spectral import LowRank
from ..spectral.lowrank import total
from . import slots as slot
from .base.fingerprint import FINGERPRINT
from .base.sharding import whole
from .experts.expert import SpectralExpert
from .layer import SpectralLinear
from .naming import check_name, exactly, target
from .starting import all_layers, settle, withdraw

Combination = Literal["cat", "linear", "svd"]
OF_LORA = ("density", "majority_sign_method", "svd_clamp", "svd_full_matrices", "svd_driver")


class Sum(NamedTuple):
    """The weighted sum in one layer."""

    value: LowRank
    error: float  # relative, in the Frobenius norm
    fingerprint: Tensor  # of the base weight, a source's


class Combining:
    """The part of a `SpectralModel` that makes one adapter of several."""

    def add_weighted_adapter(
        self: Any,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Combination = "svd",
        svd_rank: int | None = None,
        **of_lora: Any,
    ) -> dict[str, float]:
        """Adds an adapter whose update is the weighted sum of others' (`get_delta_weight`), of whatever methods.

        What leaves the base for a source is part of its update, and weighted with it. The new adapter is an SLoRA,
        `NLoRAConfig(variant="slora")`: L K R and nothing else. It needs its sources no more.

        Args:
            adapters: their names.
            weights: a number for each.
            adapter_name: of the new one, which is not made active.
            combination_type: "cat" and "linear": exact, and one and the same here (LoRA's "linear" adds up factors,
                which leaves products of one adapter's with another's). The ranks add up, but for frames that adapters
                share: where their cores alone learn, from one start, the rank stays. "svd": the best approximation of
                rank svd_rank.
            svd_rank: None: the largest rank of a source's update, as an exact LoRA.
            **of_lora: the further arguments that PEFT's LoRA takes, to be refused in words.

        Returns:
            By module, the relative error against the exact sum, in the Frobenius norm.

        Raises:
            ValueError: unknown or taken names, sources that train modules in full or tokens, or are not calibrated;
                LoRA's kinds "ties", "dare" and "magnitude_prune", and their arguments.

        Examples:
            >>> import torch
            >>> from peft import get_peft_model
            >>> from peft_kasa import KaSAConfig, PiSSAConfig
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
            >>> model = get_peft_model(model, KaSAConfig(r=1, target_modules=["0"]), adapter_name="one")
            >>> model.add_adapter("two", PiSSAConfig(r=1, target_modules=["0"]))
            >>> model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type="cat")
            {'0': 0.0}
            >>> model.set_adapter("both")
        """
        check_name(adapter_name)
        _check(self, adapters, weights, adapter_name, combination_type, svd_rank)
        _refuse(of_lora)
        return _combine(self, list(zip(adapters, weights, strict=True)), adapter_name, combination_type, svd_rank)


@torch.no_grad()
def _combine(
    tuner: Any, terms: list[tuple[str, float]], adapter: str, kind: Combination, rank: int | None
) -> dict[str, float]:
    settle(tuner.model, [name for name, _ in terms])
    _warn_of_cuts(list(all_layers(tuner.model)), terms)
    sums = {}
    for layer in all_layers(tuner.model):
        if held := [(name, weight) for name, weight in terms if name in layer.adapters]:
            sums[layer] = _sum(layer, held, kind, rank)
    ranks: dict[str, int] = {}
    for layer, summed in sums.items():
        ranks[layer.pattern_name] = max(summed.value.rank, ranks.get(layer.pattern_name, 0))
    stacks = {layer.pattern_name for layer in sums if isinstance(layer, SpectralExpert)}
    tuner.peft_config[adapter] = _config(tuner, terms[0][0], ranks, stacks)
    tuner.inject_adapter(tuner.model, adapter)
    try:
        for layer, summed in sums.items():
            _fill(layer, adapter, summed)
    except BaseException:
        withdraw(tuner.model, adapter)
        raise
    return {layer.name: summed.error for layer, summed in sums.items()}


def _check(tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter: str, kind: str, rank: Any) -> None:
    """Raises ValueError for arguments that do not go together."""
    known = sorted(tuner.peft_config)
    require(len(adapters) > 0, f"adapters has to name at least one of {known}", adapters)
    unknown = sorted(set(adapters) - set(known))
    require(not unknown, f"adapters have to be of {known}", unknown)
    require(len(weights) == len(adapters), f"weights has to have {len(adapters)} entries, one an adapter", len(weights))
    require(all(map(math.isfinite, weights)), "weights have to be finite numbers", weights)
    require(adapter not in known, "adapter_name has to be a new one (delete_adapter removes one)", adapter)
    choice("combination_type", kind, ("cat", "linear", "svd"))
    whole = rank is None or (type(rank) is int and rank >= 1)
    require(whole, "svd_rank has to be a whole number of at least 1", rank)
    require(rank is None or kind == "svd", "svd_rank is for combination_type='svd'", kind)
    for name in adapters:
        config = tuner.peft_config[name]
        rule = (
            f"adapter {name!r} also trains modules in full, tokens or biases, which are no updates that add up: "
            "combine adapters without modules_to_save, trainable_token_indices and bias"
        )
        require(not config.beyond, rule, config.beyond)


def _refuse(of_lora: dict[str, Any]) -> None:
    """Raises for arguments that are not of this package: TypeError for those that are not of LoRA either."""
    for name, found in of_lora.items():
        if name not in OF_LORA:
            raise TypeError(f"add_weighted_adapter has no argument {name!r}.{remedy(name, ('svd_rank', *OF_LORA))}")
        require(False, f"{name} is of LoRA's kinds of combination, which are not here: leave it out", found)


def _sum(layer: SpectralLinear, terms: list[tuple[str, float]], kind: Combination, rank: int | None) -> Sum:
    parts = [layer.lowrank(name).scaled(weight) for name, weight in terms]
    value, error = total(parts), 0.0
    most = min(layer.out_features, layer.in_features)  # no matrix has more: nothing is lost there
    if kind == "svd":
        most = min(most, rank or max(part.rank for part in parts))
    if value.rank > most:
        value, error = value.truncated(most)
    return Sum(value, error, whole(layer.slots(terms[0][0])[FINGERPRINT]))


def _config(tuner: Any, source: str, ranks: dict[str, int], stacks: set[str]) -> NLoRAConfig:
    """Of an SLoRA, the member that is L K R and nothing else; its values are about to follow."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    like = tuner.peft_config[source]
    config = NLoRAConfig(
        variant="slora",
        r=usual,
        rank_pattern={exactly(name, ranks): rank for name, rank in ranks.items() if rank != usual},
        task_type=like.task_type,
        base_model_name_or_path=like.base_model_name_or_path,
        revision=like.revision,
        inference_mode=like.inference_mode,
    )
    target(config, tuner.model, ranks.keys() - stacks, stacks)
    config.from_file = True  # type: ignore[misc]
    return config


def _fill(layer: SpectralLinear, adapter: str, summed: Sum) -> None:
    value = summed.value.padded(layer.adapters[adapter].rank)  # the experts of a stack have one rank
    values: dict[str, Tensor] = {**value._asdict(), FINGERPRINT: summed.fingerprint}
    values["core"] = torch.diag(value.core)
    for name, parameter in layer.slots(adapter).items():
        parameter.copy_(values[name])
    layer.adapters[adapter].awaiting = False


def _warn_of_cuts(layers: list[SpectralLinear], terms: list[tuple[str, float]]) -> None:
    cutting = {name for layer in layers for name in layer.adapters if slot.cut(layer.slots(name)) is not None}
    weight = sum(weight for name, weight in terms if name in cutting)
    if weight > 1 + 1e-6:
        warnings.warn(
            f"Each update has its own cut of W, so the triples that {sorted(cutting & {name for name, _ in terms})} "
            f"take out leave {weight:g} times. Give these adapters weights of the sum 1 to take them out once.",
            stacklevel=4,
        )
