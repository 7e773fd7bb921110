"""Files of plain LoRA adapters, as PEFT and `export_lora` write them."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..adapter.layer import SpectralLinear
from ..methods.method import require
from ..sharing.lora_kinds import UNTOUCHED
from ..spectral import LowRank
from ..spectral.lowrank import from_factors
from .adapter_file import AdapterFile


class LoraFile(AdapterFile):
    """A LoRA whose B A is what it adds to the base weight. Others are refused: DoRA, and starts that write the base."""

    method = "lora"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        start, rule = self.fields.get("init_lora_weights", True), "init_lora_weights has to be one that leaves the base"
        remedy = f"{rule} as it is ({', '.join(map(str, UNTOUCHED))}): B A is no update of it otherwise"
        require(start in UNTOUCHED, f"{self.path}: {remedy}", start)
        stacks = self.fields.get("target_parameters")
        rule = f"{self.path} has to be a plain LoRA of linear layers: target_parameters has to be None"
        require(not stacks, rule, stacks)
        other = [key for key in self.tensors if "lora_" in key and not key.endswith(("lora_A.weight", "lora_B.weight"))]
        require(
            not other, f"{self.path} has to be a plain LoRA of linear layers, of lora_A and lora_B alone", other[:1]
        )

    @cached_property
    def slots(self) -> dict[str, dict[str, Tensor]]:
        modules: dict[str, dict[str, Tensor]] = {}
        for module, name, value in self.found(r"lora_(?P<slot>[AB])\.weight"):
            modules.setdefault(module, {})[name] = value
        require(bool(modules), f"{self.path} has to hold lora_A and lora_B of linear layers", sorted(self.tensors)[:3])
        for module, pair in modules.items():
            fits = len(pair) == 2 and pair["A"].ndim == pair["B"].ndim == 2 and len(pair["A"]) == pair["B"].shape[1]
            rule = f"{module}: lora_A and lora_B have to be of shapes (r, n) and (m, r)"
            require(fits, rule, {key: tuple(value.shape) for key, value in pair.items()})
        return modules

    def rank(self, name: str) -> int:
        return len(self.slots[name]["A"])

    def learns(self, key: str) -> bool:
        return True

    def update(self, name: str, layer: SpectralLinear | None = None) -> LowRank:
        up, down = (self.slots[name][side].float() for side in "BA")
        if layer is not None:
            shape = (layer.out_features, layer.in_features)
            rule = (
                f"{name}: the base does not fit the adapter. The weight has to be of shape {(len(up), down.shape[1])}"
            )
            require(shape == (len(up), down.shape[1]), rule, shape)
        return from_factors(up, down).scaled(self._scale(name))

    @cached_property
    def _config(self) -> LoraConfig:
        names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
        return LoraConfig(**{name: self.fields[name] for name in names if self.fields.get(name) is not None})

    def _scale(self, name: str) -> float:
        config = self._config
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        return alpha / (math.sqrt(self.rank(name)) if config.use_rslora else self.rank(name))
