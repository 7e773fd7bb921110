"""A LoRA as an adapter of the family, where that is exact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn

from ..adapter.base.fingerprint import FINGERPRINT, sketch
from ..adapter.files import source
from ..adapter.keys import FROZEN, LEARNT, file_key
from ..adapter.layer import SpectralLinear
from ..adapter.starting import named_layers, withdraw
from ..methods import EVAConfig, PiSSAConfig, SpectralConfig
from ..methods.method import require
from .lora_kinds import CARRIED, check, displaces, recomputable
from .lora_tensors import Pair

Path = str | os.PathLike[str]


def from_lora(model: nn.Module, path: Path, initial: Path | None = None, adapter: str = "default") -> PeftModel:
    """Puts a saved LoRA on a model as an adapter of the family: the same update, and it trains on.

    A plain LoRA becomes an EVA, whose update is s B A too, with nothing taken from the base; EVA's own start is behind
    it. What PEFT saved of PiSSA or OLoRA belongs to a base less its start, s (B A - B0 A0) on the original one: that is
    a PiSSA whose start is B0 A0.

    Args:
        model: the original base model. It is wrapped; no weight of it changes.
        path: the folder, or the Hub's name, of the saved LoRA.
        initial: the same LoRA as it was saved before training, B0 and A0. None: PEFT's own start is computed again,
            where it has no random part ("pissa", "olora").
        adapter: the name that it gets.

    Raises:
        ValueError: not a LoRA of linear layers, a variant that is no plain product (DoRA, KaSA, aLoRA ...), a start
            that cannot be known, tensors that are missing, or a PeftModel for the base. It names what is in the way;
            the model stays as it was.

    Examples:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_kasa import from_lora
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lora = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        ...     lora.save_pretrained(folder)
        ...     model = from_lora(lora.unload(), folder)
        >>> model.base_model.model[0]
        SpectralLinear(default: eva r=2 s=4, base=Linear(in_features=8, out_features=6, bias=True))
    """
    rule = "model has to be a base model, without adapters: give what its unload() returns"
    require(not isinstance(model, PeftModel), rule, type(model).__name__)
    config, state = _read(path)
    start, known = displaces(config), None if initial is None else _read(initial)[1]
    require(
        start or known is None, f"{os.fspath(path)}: initial has to be None, since this LoRA took nothing out", initial
    )
    if start and known is None and not recomputable(config):
        raise ValueError(
            f"{os.fspath(path)}: init_lora_weights={config.init_lora_weights!r} has taken a start out of the base that "
            "cannot be computed again. Give initial=, the adapter as it was saved before training; or save it in PEFT "
            "with path_initial_model_for_weight_conversion=."
        )
    try:
        wrapped = get_peft_model(model, _ours(config, start), adapter_name=adapter)  # type: ignore[arg-type]
        _fill(wrapped, adapter, config, state, known, start)
    except BaseException:
        withdraw(model, adapter)
        raise
    return wrapped


def _read(path: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    path = os.fspath(path)
    config = PeftConfig.from_pretrained(path)
    rule = f"{path} has to be a LoRA"
    require(isinstance(config, LoraConfig), rule, getattr(config.peft_type, "value", config.peft_type))
    source.check(path)
    state = load_peft_weights(path, device="cpu")
    check(config, state, path)  # type: ignore[arg-type]
    return config, state  # type: ignore[return-value]


def _ours(lora: LoraConfig, start: bool) -> SpectralConfig:
    given = {ours: getattr(lora, theirs) for theirs, ours in CARRIED.items()}
    config = PiSSAConfig(**given) if start else EVAConfig(**given, rank_budget=None)
    config.from_file = True  # type: ignore[misc]  # its values follow: nothing is decomposed
    return config


def _fill(
    model: PeftModel,
    adapter: str,
    lora: LoraConfig,
    state: dict[str, Tensor],
    known: Mapping[str, Tensor] | None,
    start: bool,
) -> None:
    state = dict(state)
    for path, layer in named_layers(model, adapter):
        pair = _pair(state, path, layer.name)
        begun = None
        if start:
            begun = _pair(dict(known), path, layer.name) if known else _peft_start(layer, adapter, lora)
        for slot, value in _slots(pair, begun).items():
            kind = LEARNT if slot in layer.learnt(adapter) else FROZEN
            state[file_key(path, kind, slot)] = value
        state[file_key(path, FROZEN, FINGERPRINT)] = sketch(layer.base.matrix(as_repacked=True))
    if left := sorted(key for key in state if ".lora_" in key):
        raise ValueError(
            f"{left[0]}: nothing takes this tensor ({len(left)} in all). Give the base the LoRA was made on."
        )
    try:
        set_peft_model_state_dict(model, state, adapter_name=adapter)
    except KeyError as missing:  # of modules_to_save
        raise ValueError(f"The LoRA's file lacks {missing.args[0]}. Restore the file from its source.") from None


def _pair(state: dict[str, Tensor], path: str, name: str) -> Pair:
    """Takes B and A of a module out of a state dict."""
    try:
        down, up = (state.pop(f"{path}.lora_{side}.weight").float() for side in "AB")
    except KeyError as missing:
        raise ValueError(
            f"{name}: the LoRA's file lacks {missing.args[0]}. Restore the file from its source."
        ) from None
    return up, down


def _slots(pair: Pair, begun: Pair | None) -> dict[str, Tensor]:
    """The slots of B A, or of B A - B0 A0 as differences from its start."""
    (up, down), ones = pair, torch.ones(len(pair[1]))
    if begun is None:
        return {"left": up, "core": ones, "right": down}
    return {"left0": begun[0], "core0": ones, "right0": begun[1], "left": up - begun[0], "right": down - begun[1]}


def _peft_start(layer: SpectralLinear, adapter: str, lora: LoraConfig) -> Pair:
    """B0 and A0 as PEFT computes them of this weight, on a copy."""
    weight, known = layer.base.matrix(), layer.adapters[adapter]
    copy = nn.Linear(layer.in_features, layer.out_features, bias=False, device=weight.device)
    copy.weight.data = weight.clone()
    alpha = known.scale * known.rank  # whatever the patterns and rsLoRA made of it
    config = LoraConfig(r=known.rank, lora_alpha=alpha, init_lora_weights=lora.init_lora_weights, target_modules=["0"])  # type: ignore[arg-type]
    begun: Any = get_peft_model(nn.Sequential(copy), config).base_model.model[0]  # type: ignore[arg-type, index]
    return begun.lora_B["default"].weight.detach().float().cpu(), begun.lora_A["default"].weight.detach().float().cpu()
