"""Wraps a model's linear layers and gives every adapter its start."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import Tensor, nn

from ..methods.method import SpectralConfig
from ..peft_type import PREFIX
from .base.guarding import guard
from .base.misread import warn_of_misread
from .base.offload import check_at_hand
from .base.sharding import bare
from .before import note
from .budget import adopt, start_adapter
from .choosing import Choosing
from .combining import Combining
from .experts.wrapper import adapt, check_plain, stacks
from .files import checkpoint
from .files.anchors import ANCHOR
from .files.file_fields import check_counts
from .keys import FROZEN, slot_key
from .layer import SpectralLinear
from .merging_models import MergingModels
from .mixing import by_row, repeats
from .naming import check_name
from .starting import (
    frames,
    give_up,
    layers_of,
    named_layers,
    settle,
    take_out_others,
    unshared,
    withdraw,
)
from .supported import unsupported


class SpectralModel(Choosing, Combining, MergingModels, BaseTuner):
    """The tuner of the family: what `get_peft_model(model, KaSAConfig(...))` puts between PeftModel and the model.

    Adapters of different methods may live on one base, and several may be active at once.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_kasa import KaSAConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> model = get_peft_model(model, KaSAConfig(r=2, target_modules=["0", "2"]))
        >>> model.base_model.model[0]
        SpectralLinear(default: kasa r=2 s=2, base=Linear(in_features=8, out_features=6, bias=True))
    """

    prefix = PREFIX
    tuner_layer_cls = SpectralLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wraps the targets and starts the adapter, unless its values are about to come from a file.

        A config that another adapter has already is copied. On any error the model is left without the adapter.
        """
        check_name(adapter_name)
        settle(model)
        config: Any = self.peft_config[adapter_name]
        from_file, config.from_file = config.from_file, False  # told once: another adapter with it starts afresh
        config = self.peft_config[adapter_name] = unshared(config)
        note(model, adapter_name)
        values_follow = from_file or low_cpu_mem_usage or state_dict is not None
        try:
            self._stacks = stacks(model)
            if from_file:
                check_counts(config, sum(1 for _ in model.modules()))
            check_plain(model, config.target_parameters)
            with warnings.catch_warnings():
                if config.target_parameters:  # PEFT looks for what patterns match among modules alone
                    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            take_out_others(model, adapter_name, config)
            guard(model)
            layers = list(layers_of(model, adapter_name))
            warn_of_misread({layer.name: layer.base for layer in layers})
            if values_follow:
                check_at_hand(layers)
            for layer in layers:
                layer.adapters[adapter_name].peers = len(layers)
            if not values_follow and not (config.needs and config.statistics is None):
                start_adapter(model, adapter_name)
        except BaseException:
            withdraw(model, adapter_name)
            raise

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: SpectralConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **_: Any,
    ) -> None:
        if parameter_name is not None:
            return adapt(parent, target_name, target, current_key, parameter_name, adapter_name, peft_config)
        layer = target
        if not isinstance(layer, SpectralLinear):
            if reason := unsupported(target):
                raise TypeError(f"{current_key}: {reason}, or leave it out (target_modules, exclude_modules).")
            layer = SpectralLinear(target, current_key, **get_quantization_kwargs(self))
        layer.reserve(adapter_name, peft_config)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _check_target_module_exists(self, peft_config: SpectralConfig, key: str) -> Any:  # type: ignore[override]
        """As in PEFT, but for what stands for stacked experts: it has their names and is no module to adapt."""
        return False if key.startswith(self._stacks) else super()._check_target_module_exists(peft_config, key)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """As in PEFT; where it knows no default target_modules, target_parameters alone will do."""
        known = model_config["model_type"] in self.target_module_mapping
        if peft_config.target_modules is None and peft_config.target_parameters and not known:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # a wrapper makes its slots where its base layer is: nothing to move

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: Collection[str]) -> None:
        """With ensure_weight_tying the embedding alone is trained; PEFT ties the rest to it (`modules_to_tie`)."""
        embedding = next(path for path, module in self.model.named_modules() if module is self._embedding())
        tied = (embedding, *tied_weight_keys)
        others = [
            name for name in peft_config.modules_to_save if not any(f".{key}".endswith(f".{name}") for key in tied)
        ]
        peft_config.modules_to_save = [*others, embedding]
        peft_config.modules_to_tie = set(tied_weight_keys)

    def _embedding(self) -> nn.Module:
        found = self.model.get_input_embeddings()
        return getattr(found, "original_module", found)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        settle(model, [adapter_name])
        state = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        state = checkpoint.own(state, adapter_name)
        for path, layer in named_layers(model, adapter_name):
            checkpoint.complete(state, bare(path), layer, adapter_name)
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        checkpoint.check_undivided(layers_of(model, adapter_name), adapter_name)
        adopt(model, adapter_name, mapped)
        layers = dict(named_layers(model, adapter_name))
        if config.keeps_frames:  # a file may have more than is needed
            anchor = slot_key("", FROZEN, adapter_name, ANCHOR)
            mapped = {key: value for key, value in mapped.items() if anchor not in key}
        try:
            checkpoint.check(model, adapter_name, mapped)
            if not config.keeps_frames and not any(layer.base.absent for layer in layers.values()):
                mapped |= frames(layers, adapter_name, mapped)
        except ValueError:
            give_up(model, adapter_name)
            raise
        for layer in layers.values():
            known = layer.adapters[adapter_name]
            known.awaiting, known.start_checksums = layer.on_meta(adapter_name), ""  # checked at first use then
        return mapped

    def _enable_peft_forward_hooks(self, *_: Any, adapter_names: list[str] | None = None, **given: Any) -> Any:
        return nullcontext() if adapter_names is None else by_row(self, adapter_names, repeats(given))

    def __repr__(self) -> str:
        return f"SpectralModel({self.model!r})"
