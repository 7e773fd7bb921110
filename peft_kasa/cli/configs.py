"""A method's config from words of a command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..methods import typed
from ..methods.arguments import remedy
from ..methods.method import SpectralConfig, methods

HIDDEN = {"method", "peft_type", "auto_mapping", "peft_version", "inference_mode", "statistics", "init_weights"}


def config_class(name: str) -> type[SpectralConfig]:
    """The config of a method, by its name in any case, with or without dashes.

    Raises:
        ValueError: there is no such method.
    """
    known = methods()
    wanted = name.lower().replace("-", "_")
    flat = {key.replace("_", ""): key for key in known}
    found = flat.get(wanted.replace("_", "").removesuffix("config"))
    if found is None:
        raise ValueError(
            f"The method has to be one of {', '.join(sorted(known))}. Found {name!r}.{remedy(wanted, known)}"
        )
    return known[found]


def build_config(method: str, given: Mapping[str, Any], words: Sequence[str] = ()) -> SpectralConfig:
    """The config of a method.

    Args:
        method: its name.
        given: its fields; those that are None are left at the method's defaults.
        words: fields that `given` has not, as "name=value", values as JSON or as plain text.

    Raises:
        ValueError: a field that the method has not or that is in `given`, or a value of another type or out of range.
    """
    kind = config_class(method)
    further = _assigned(words)
    for name in given.keys() & further.keys():
        raise ValueError(f"NAME=VALUE is for arguments that have no option of their own. Found {name}.")
    values = {name: value for name, value in given.items() if value is not None} | further
    known = {field.name for field in fields(kind)} - HIDDEN
    for name in values:
        if name not in known:
            raise ValueError(
                f"{kind.__name__} has no argument {name!r}.{remedy(name, known)} `peft-kasa methods {kind.name}`"
            )
    typed.check(kind, values)
    return kind(**values)


def _assigned(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ValueError(f"A further argument has to be NAME=VALUE. Found {word!r}.")
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            words_of_python = {"True": True, "False": False, "None": None}
            found[name.replace("-", "_")] = words_of_python.get(value, value)
    return found
