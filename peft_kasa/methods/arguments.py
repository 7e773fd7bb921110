"""What is said of arguments that a method's config has not."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

HAND = "hand the fields of it to {}, the method's own config"
LORA = {  # LoraConfig's names, and what there is in their place
    "lora_alpha": "the name here is alpha",
    "lora_dropout": "the name here is dropout",
    "init_lora_weights": "the start is the choice of the config's class, and init_weights=False adds noise to it",
    "fan_in_fan_out": "leave it out, since Conv1D is recognised",
    "corda_config": HAND.format("CorDAConfig"),
    "eva_config": HAND.format("EVAConfig"),
    "kasa_config": HAND.format("KaSAConfig"),
}


class Checked:
    """A config that refuses arguments which it has not, with a remedy.

    `__new__` of a base: the `__init__` that dataclasses write, and with it the signature, stays as it is. Unpickling
    and copying give no arguments.
    """

    def __new__(cls, *_: Any, **given: Any) -> Any:
        known = inspect.signature(cls.__init__).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        for name in given:
            if name not in known and not open_ended:
                raise TypeError(f"{cls.__name__} has no argument {name!r}.{remedy(name, known)}")
        return super().__new__(cls)


def remedy(name: str, known: Iterable[str]) -> str:
    """A sentence on what to give instead of an unknown name, after a space; empty if nothing is like it.

    Examples:
        >>> from peft_kasa.methods.arguments import remedy
        >>> remedy("lora_alpha", ["alpha"]), remedy("drop_out", ["alpha", "dropout"])
        (' It is of LoraConfig: the name here is alpha.', " Did you mean 'dropout'?")
    """
    if name in LORA:
        return f" It is of LoraConfig: {LORA[name]}."
    near = get_close_matches(name, list(known), 1)
    return f" Did you mean {near[0]!r}?" if near else ""
