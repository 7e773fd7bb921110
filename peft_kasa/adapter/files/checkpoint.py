"""What an adapter's file holds, and whether it fits the model. Every refusal names the module and the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from ...methods.method import require
from ..base.fingerprint import FINGERPRINT, FOREIGN, SAME, distance, sketch
from ..base.sharding import in_parts, whole_shape, wholes
from ..keys import FROZEN, LEARNT, adapter_of, is_slot, slot_key, slot_of
from . import anchors
from .biases import check_biases, trained_biases
from .expected import Expected, check_keys, check_value

DRIFT = (
    "The base is not the one the adapter was made on, but another storage or a fine-tuned relative of it, and outputs "
    "will differ accordingly"
)


def own(state: dict[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """A state dict without other adapters' slots: PEFT lets them in where an adapter is called as all modules are."""
    return {key: value for key, value in state.items() if not is_slot(key) or adapter_of(key) == adapter}


def complete(state: dict[str, Tensor], path: str, layer: Any, adapter: str) -> None:
    """Makes a state dict hold what the adapter's file has of a layer: whole tensors, anchors in place of frames.

    Tensors that are whole in it stay, so that one process can save what all have gathered.
    """
    keys = _keys(path, layer, adapter)
    copies = layer.adapters[adapter].gathered
    given = {slot: state.pop(key, copies.get(slot)) for slot, (key, _) in keys.items()}
    asked = {
        slot: found if (found := given[slot]) is not None and _has_all(found, value) else value
        for slot, (_, value) in keys.items()
    }
    slots = {slot: value.detach() for slot, value in wholes(asked).items()}
    kept = {slot: value for slot, value in slots.items() if not slot.startswith(anchors.ANCHOR)}
    if not layer.adapters[adapter].config.keeps_frames:
        kept |= anchors.anchors(kept, layer.learnt(adapter))
    without, new = left_out(layer, adapter), slot_key(path, FROZEN, adapter)  # anchors, if save_frames was switched
    state |= {keys[s][0] if s in keys else new + s: value for s, value in kept.items() if s not in without}


def _has_all(found: Tensor, value: Tensor) -> bool:
    """Whether a state dict's tensor is the whole of a slot: what FSDP1 flattens has its shape there alone."""
    return not in_parts(value) or found.shape == whole_shape(value)


def _keys(path: str, layer: Any, adapter: str) -> dict[str, tuple[str, Tensor]]:
    """Each slot's key in a state dict, and its value in the layer."""
    holders = {LEARNT: layer.peft_kasa_learnt[adapter], FROZEN: layer.peft_kasa_frozen[adapter]}
    return {
        slot: (slot_key(path, kind, adapter, slot), value)
        for kind, holder in holders.items()
        for slot, value in holder.named_parameters()
    }


def check_undivided(layers: Iterable[Any], adapter: str) -> None:
    """Raises ValueError where processes hold the adapter's own tensors in parts, which a file would not fit."""
    for layer in layers:
        if any(in_parts(value) for value in layer.slots(adapter).values()):
            raise ValueError(
                f"{layer.name}: adapter {adapter!r} is sharded over processes already, and its file is not. Load it "
                "before fully_shard or deepspeed.initialize."
            )


def check(model: nn.Module, adapter: str, state: dict[str, Tensor]) -> None:
    """Checks a state dict, by the model's own keys, before anything of it is loaded.

    Raises:
        ValueError: keys that are missing or that nothing takes, another shape, NaN, or another base.
    """
    ours: dict[str, Any] = {path: module for path, module in model.named_modules() if hasattr(module, LEARNT)}
    layers = {path: layer for path, layer in ours.items() if adapter in layer.adapters}
    config: Any = next((layer.adapters[adapter].config for layer in layers.values()), None)
    expected = {
        key: Expected(layer.name, slot, tuple(value.shape), layer.adapters[adapter].rank if config.r else None)
        for path, layer in layers.items()
        for slot, (key, value) in _keys(path, layer, adapter).items()
        if slot not in left_out(layer, adapter)
    }
    check_keys(config.name if config else "", expected, state)
    biases = trained_biases(model, set(layers), config) if config else set()
    check_biases(biases, state)
    others = {key: value for key, value in state.items() if key not in expected}
    _check_others(model, adapter, others, biases)
    for key, each in expected.items():
        check_value(*each, state[key])
    for path, layer in layers.items():
        _check_core(layer, adapter, path, state)
    saved = {layer: state[slot_key(path, FROZEN, adapter, FINGERPRINT)] for path, layer in layers.items()}
    _warn_of_drift({layer.name: _check_base(layer, adapter, sketched) for layer, sketched in saved.items()})


def left_out(layer: Any, adapter: str) -> set[str]:
    """The slots that the adapter's checkpoint does without."""
    if layer.adapters[adapter].config.keeps_frames:
        return set()
    return anchors.left_out(layer.slots(adapter).keys(), layer.learnt(adapter) | {FINGERPRINT})


def arrived(layer: Any, adapter: str) -> bool:
    """Whether a loader other than PEFT's (transformers' own, `load_state_dict`) has filled the slots of a layer.

    Raises:
        ValueError: if it filled only some, or from another base.
    """
    name, without = layer.name, left_out(layer, adapter)
    slots = {slot: value for slot, value in layer.whole_slots(adapter).items() if slot not in without}
    if empty := [slot for slot, value in slots.items() if value.is_meta]:
        raise ValueError(
            f"{name}: {', '.join(empty)} of adapter {adapter!r} hold no values. Load them from its file, or "
            "create the adapter without low_cpu_mem_usage=True."
        )
    missing = [slot for slot, value in slots.items() if torch.isnan(value).any()]
    if len(missing) == len(slots):
        return False
    if missing:
        raise ValueError(
            f"{name}: the file of adapter {adapter!r} did not give {', '.join(missing)}, or gave NaN. "
            "Save the adapter again from its source."
        )
    if _check_base(layer, adapter, slots[FINGERPRINT]) > SAME:
        warnings.warn(DRIFT + ".", stacklevel=2)  # the same words for each layer: Python shows them once
    return True


def _check_others(model: nn.Module, adapter: str, state: dict[str, Tensor], biases: set[str]) -> None:
    """What a file may hold besides slots: modules_to_save, trained tokens, biases that its config trains, and the
    embeddings, which PEFT saves whole (`save_embedding_layers`) and loads over the base's. No other base weight.
    """
    shapes = {_bare(name): tuple(value.shape) for name, value in model.named_parameters()} if state else {}
    for key, value in state.items():
        name = _bare(key)
        own = (".modules_to_save." in key or ".token_adapter." in key) and f".{adapter}." in f"{key}."
        if not own and key not in biases and not _is_embedding(key):
            raise ValueError(
                f"{name}: the adapter's file has this tensor, which is none of the "
                "adapter's and might overwrite the base. Save the adapter again from its source."
            )
        check_value(name, "its value", shapes.get(name, tuple(value.shape)), None, value)


def _bare(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _is_embedding(key: str) -> bool:
    return key.endswith(
        tuple(f".{name}{base}.weight" for name in EMBEDDING_LAYER_NAMES for base in ("", ".base_layer"))
    )


def _check_core(layer: Any, adapter: str, path: str, state: dict[str, Tensor]) -> None:
    """Where the core is made of what learns and of what is kept beside it, such as places in a matrix, it is made once.

    Before any value is loaded: a place outside of the matrix would fail at the first forward pass.
    """
    held = (slot_key(path, LEARNT, adapter), slot_key(path, FROZEN, adapter))
    slots = {slot_of(key): value.float() for key, value in state.items() if key.startswith(held)}
    if "fixed" not in slots:
        return
    known = layer.adapters[adapter]
    raw = sum((slots[name] for name in ("core", "core0") if name in slots), torch.zeros(()))
    try:
        core = known.config.core(raw, slots["fixed"], known.rank)
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"{layer.name}: fixed in the adapter's file gives no core: {error}. Use another.") from error
    check_value(layer.name, "the core", tuple(core.shape), None, core)


def _check_base(layer: Any, adapter: str, saved: Tensor) -> float:
    rule = f"{layer.name}: adapter {adapter!r} has to be unmerged (unmerge_adapter) to take the values of a file"
    require(adapter not in layer.merged_adapters, rule, layer.merged_adapters)
    if layer.base.absent:
        return 0.0
    found = distance(saved, sketch(layer.original()))  # without what other adapters have merged into it
    if found > FOREIGN:
        raise ValueError(
            f"{layer.name}: the adapter was trained on another weight (relative distance {found:.2f}, the limit is "
            f"{FOREIGN}). Load the base model that adapter_config.json names."
        )
    if found > SAME and not layer.adapters[adapter].config.keeps_frames:
        raise ValueError(
            f"{layer.name}: the adapter's file holds no frames, and this base weight is not the one to compute them "
            f"from (relative distance {found:.1e}): another storage of it, or a relative. Load the base as it was "
            "trained on, or save the adapter with save_frames=True."
        )
    return found


def _warn_of_drift(drift: dict[str, float]) -> None:
    name = max(drift, key=drift.__getitem__, default=None)
    if name is None or drift[name] <= SAME:
        return
    warnings.warn(
        f"{DRIFT}: {sum(d > SAME for d in drift.values())} of {len(drift)} weights differ, by {drift[name]:.1e} of "
        f"their norm at most ({name}).",
        stacklevel=2,
    )
