"""Any adapter of the family as a plain LoRA on the original base. Nothing here knows a method."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapter.experts.expert import SpectralExpert
from ..adapter.keys import is_slot
from ..adapter.layer import SpectralLinear
from ..adapter.naming import exactly
from ..adapter.starting import adapted
from ..files import replacing
from ..methods.method import SpectralConfig, require
from ..peft_type import NAME
from .lora_tensors import plain, stacked

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes
LARGEST_RANK = SERVED_RANKS[-1]


@dataclass
class LoraExport:
    """What an export made.

    Attributes:
        rank: the largest rank of a module.
        max_lora_rank: the --max-lora-rank that vLLM needs for it.
        errors: by module, the relative Frobenius error of the update. All 0.0 unless a `rank` was asked for.
        path: the folder that was written.
    """

    rank: int
    max_lora_rank: int
    errors: dict[str, float] = field(repr=False)
    path: str = ""

    def __str__(self) -> str:
        worst = max(self.errors, key=self.errors.__getitem__)
        loss = f"error up to {self.errors[worst]:.1e} ({worst})" if self.errors[worst] else "exact"
        served = f"vLLM: --max-lora-rank {self.max_lora_rank}"
        return f"LoRA of rank {self.rank} for {len(self.errors)} modules, {loss}; {served}"


@torch.no_grad()
def to_lora(
    model: nn.Module, adapter: str = "default", rank: int | None = None, uniform: bool = True
) -> tuple[LoraConfig, dict[str, Tensor], LoraExport]:
    """An adapter as a LoraConfig and the tensors of a LoRA on the original base, not written anywhere.

    B A = s L C R - F for each module, exactly: of rank k where a frame is frozen or nothing leaves, else k + rank F.

    Args:
        model: a PeftModel, or a model with adapters injected.
        adapter: its name.
        rank: truncate every module to this rank, which is then the best of its rank. None: exact.
        uniform: one rank for all modules (zero-padded), no patterns: what servers read. False: each module its own.

    Raises:
        ValueError: an unknown adapter, a rank above 512 that was not asked for, or, with `uniform`, an adapter that
            trains modules in full, tokens or biases besides.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_kasa import SVFitConfig, to_lora
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), SVFitConfig(r=2, target_modules=["0"]))
        >>> config, tensors, report = to_lora(model)
        >>> (config.r, report.rank, sorted(name.rpartition("model.")[2] for name in tensors))
        (2, 2, ['0.lora_A.weight', '0.lora_B.weight'])
    """
    layers = adapted(model, adapter)
    config = _config(model, adapter)
    require(rank is None or type(rank) is int, "rank has to be a whole number", rank)
    require(rank is None or rank >= 1, "rank has to be at least 1", rank)
    extra = _beyond_slots(model, adapter, config, uniform)
    values = {name: layer.lowrank(adapter) for name, layer in layers.items()}
    errors = dict.fromkeys(values, 0.0)
    if rank is not None:
        for name in values:
            values[name], errors[name] = values[name].truncated(rank)
    largest = max(value.rank for value in values.values())
    if largest > LARGEST_RANK and rank is None:
        raise ValueError(
            f"The exact LoRA has rank {largest} ({max(values, key=lambda n: values[n].rank)}), above {LARGEST_RANK}, "
            "which no server takes. Pass rank= for the best approximation of that rank, or use merge_and_unload."
        )
    ranks = dict.fromkeys((layer.pattern_name for layer in layers.values()), largest if uniform else 1)
    for name, layer in layers.items():
        ranks[layer.pattern_name] = max(ranks[layer.pattern_name], values[name].rank)
    values = {name: value.padded(ranks[layers[name].pattern_name]) for name, value in values.items()}
    tensors = dict(extra)
    for name, (up, down) in {**plain(layers, values), **stacked(layers, values)}.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()
    report = LoraExport(largest, min((r for r in SERVED_RANKS if r >= largest), default=largest), errors)
    return _lora_config(model, config, layers, ranks, extra), tensors, report


def export_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter: str = "default",
    rank: int | None = None,
    uniform: bool = True,
) -> LoraExport:
    """Writes an adapter as a plain LoRA on the original base: it loads in PEFT, vLLM, SGLang or llama.cpp without this
    package. See `to_lora` for the arguments and errors; returns what was made.

    Examples:
        >>> import tempfile, torch
        >>> from peft import PeftModel, get_peft_model
        >>> from peft_kasa import PiSSAConfig, export_lora
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> model = get_peft_model(base, PiSSAConfig(r=2, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(export_lora(model, folder))
        LoRA of rank 4 for 1 modules, exact; vLLM: --max-lora-rank 8
    """
    _refuse_to_replace(os.path.join(path, CONFIG_NAME))
    lora, tensors, report = to_lora(model, adapter, rank, uniform)
    with replacing(os.path.join(path, SAFETENSORS_WEIGHTS_NAME)) as folder:
        save_file(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    with replacing(os.path.join(path, CONFIG_NAME)) as folder:
        lora.save_pretrained(folder)
    report.path = os.fspath(path)
    return report


def _refuse_to_replace(config: str) -> None:
    """An adapter's own folder would lose the adapter: a LoRA cannot be turned back."""
    if not os.path.isfile(config):
        return
    with open(config) as file:
        held = json.load(file).get("peft_type")
    require(held != NAME, f"{os.path.dirname(config)} holds an adapter of the family: export to another folder", held)


def _config(model: Any, adapter: str) -> SpectralConfig:
    return model.peft_config[adapter]


def _beyond_slots(model: Any, adapter: str, config: SpectralConfig, uniform: bool) -> dict[str, Tensor]:
    """What the adapter saves besides its slots: modules_to_save, trained tokens, biases."""
    if not config.beyond:
        return {}
    if uniform:
        raise ValueError(
            f"The adapter also trains {config.beyond}, which servers do not take in a "
            "LoRA. Pass uniform=False for a LoRA that PEFT loads, or merge_and_unload."
        )
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    return {key: value.clone() for key, value in state.items() if not is_slot(key)}  # tied ones share memory


def _lora_config(
    model: Any, config: SpectralConfig, layers: dict[str, SpectralLinear], ranks: dict[str, int], extra: Any
) -> LoraConfig:
    usual = Counter(ranks.values()).most_common(1)[0][0]
    own = {exactly(name, ranks): rank for name, rank in ranks.items() if rank != usual}
    modules = {name: layer for name, layer in layers.items() if not isinstance(layer, SpectralExpert)}
    parameters = sorted(ranks.keys() - modules.keys())
    return LoraConfig(
        r=usual,
        lora_alpha=usual,  # s is in B
        target_modules=_targets(model, modules),
        target_parameters=parameters or None,
        rank_pattern=own,
        alpha_pattern=dict(own),
        modules_to_save=sorted(set(config.modules_to_save)) if extra and config.modules_to_save else None,
        trainable_token_indices=config.trainable_token_indices if extra else None,
        ensure_weight_tying=bool(extra) and config.ensure_weight_tying,
        bias=config.bias.replace("peft_kasa", "lora"),  # type: ignore[arg-type]
        fan_in_fan_out=any(layer.base.transposed for layer in layers.values()),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _targets(model: nn.Module, layers: dict[str, SpectralLinear]) -> list[str]:
    """Short names where they mean the same modules (servers like those), else full ones."""
    short = {name.rpartition(".")[2] for name in layers}
    named = {
        name for name, m in model.named_modules() if name.rpartition(".")[2] in short and ".base_layer" not in name
    }
    return sorted(short) if len(named) == len(layers) else sorted(layers)
