"""The family in axolotl: `adapter: kasa`, or another method's name, in its YAML.

    plugins:
      - axolotl_plugin.SpectralPlugin     # this file's folder has to be on PYTHONPATH
    adapter: kasa
    lora_r: 8
    lora_target_linear: true
    spectral:                             # any other field of the method's config
      reference_truncation: true

Left out, lora_alpha is the method's own scale. `spectral: {statistics: FILE}` starts methods that need data.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel

from peft_kasa import SpectralConfig
from peft_kasa.methods import methods


class SpectralArgs(BaseModel):
    """What the YAML may hold beside axolotl's own fields."""

    spectral: dict[str, Any] | None = None


class SpectralPlugin(BasePlugin):
    """Loads the adapters of the family; axolotl asks it for those alone."""

    def get_input_args(self) -> str:
        return "axolotl_plugin.SpectralArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name) for name in methods()]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, SpectralConfig] | None:
        """(the model with an adapter, its config): a new one, or that of lora_model_dir."""
        if cfg.adapter not in methods():
            return None
        config = spectral_config(cfg)
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config


def spectral_config(cfg: Any) -> SpectralConfig:
    """The YAML's lora_* fields, then those under `spectral`, as the method's config."""
    fields = {
        "r": cfg.lora_r,
        "alpha": cfg.lora_alpha,
        "dropout": cfg.lora_dropout,
        "target_modules": "all-linear" if cfg.lora_target_linear else cfg.lora_target_modules,
        "exclude_modules": cfg.lora_exclude_modules,
        "layers_to_transform": cfg.peft_layers_to_transform,
        "layers_pattern": cfg.peft_layers_pattern,
        "rank_pattern": cfg.lora_rank_pattern,
        "alpha_pattern": cfg.lora_alpha_pattern,
        "modules_to_save": cfg.lora_modules_to_save,
        "use_rslora": cfg.peft_use_rslora,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return methods()[cfg.adapter](task_type="CAUSAL_LM", **(given | dict(cfg.spectral or {})))
