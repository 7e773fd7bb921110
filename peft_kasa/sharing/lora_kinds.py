"""What kinds of LoRA are a product B A on the original base, or on that base less a start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig
from torch import Tensor

CARRIED = {  # LoraConfig's fields to ours
    "r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "use_rslora",
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
    "ensure_weight_tying": "ensure_weight_tying",
    "task_type": "task_type",
    "base_model_name_or_path": "base_model_name_or_path",
    "revision": "revision",
}
# Fields that say nothing of a trained update: how it was started, or how it is stored in the base's layout.
HARMLESS = {
    "peft_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "init_lora_weights",
    "fan_in_fan_out",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}
UNTOUCHED = (True, False, "gaussian", "eva", "orthogonal", "mica")  # starts that leave the base as it is
COMPUTED = ("pissa", "olora")  # starts that leave it, and come out the same each time


def check(config: LoraConfig, state: Mapping[str, Tensor], path: str) -> None:
    """Raises ValueError for a LoRA that is more than a product on linear layers, by the name of what it is."""
    for field in fields(config):
        value, default = getattr(config, field.name), _default(field)
        if field.name not in {*CARRIED, *HARMLESS} and value != default and value not in (None, [], {}):
            raise ValueError(
                f"{path}: {field.name} has to be {default!r}: with it the update is not B A on linear layers alone, "
                f"and no adapter of this package is the same. Found {value!r:.80}. Merge it in PEFT (merge_and_unload)."
            )
    if config.init_lora_weights == "loftq":
        raise ValueError(
            f"{path}: init_lora_weights='loftq' belongs to a base that was quantised with it, not to the original one. "
            "Load it in PEFT."
        )
    for key, value in state.items():
        part = next((part for part in key.split(".") if part.startswith("lora_")), "lora_A")
        if part not in ("lora_A", "lora_B") or (".lora_" in key and value.ndim != 2):
            raise ValueError(f"{path}: {key} {tuple(value.shape)} is not of a linear layer. Merge it in PEFT.")


def displaces(config: LoraConfig) -> bool:
    """Whether the saved factors belong to a base less their start."""
    return config.init_lora_weights not in UNTOUCHED


def recomputable(config: LoraConfig) -> bool:
    """Whether that start is a function of the weight."""
    return config.init_lora_weights in COMPUTED


def _default(field: Any) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()
