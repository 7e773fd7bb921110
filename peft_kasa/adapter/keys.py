"""The keys of slots: `<path>.peft_kasa_learnt.<adapter>.<slot>` in a model, without the adapter in its file."""

from __future__ import annotations

from ..peft_type import PREFIX

LEARNT, FROZEN = PREFIX + "learnt", PREFIX + "frozen"  # as layers call the modules that hold the slots


def slot_key(path: str, kind: str, adapter: str, slot: str = "") -> str:
    """The key of a slot in a model's state dict; without a slot, what the keys of all of that kind start with."""
    return f"{path}.{kind}.{adapter}.{slot}"


def file_key(path: str, kind: str, slot: str) -> str:
    """The key of a slot in an adapter's file."""
    return f"{path}.{kind}.{slot}"


def is_slot(key: str) -> bool:
    """Whether a key is a slot's, of whatever adapter."""
    return f".{PREFIX}" in key


def module_of(key: str) -> str:
    """The path of the layer that a slot belongs to."""
    return key.rpartition(f".{PREFIX}")[0]


def adapter_of(key: str) -> str:
    """The adapter that a slot belongs to, by its key in a model's state dict."""
    return key.rpartition(f".{PREFIX}")[2].split(".")[1]


def slot_of(key: str) -> str:
    """The slot's name."""
    return key.rpartition(".")[2]
