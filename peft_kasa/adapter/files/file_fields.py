"""Whether the fields of an adapter_config.json, which anyone may have written, are what the config declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...methods import typed
from ...methods.method import SpectralConfig

FILE = "adapter_config.json"


def check(config_class: type[SpectralConfig], given: Mapping[str, Any]) -> None:
    """Checks the fields of a file as the constructor does, and before it: see `typed.check`.

    Raises:
        ValueError: of `typed.check`; or a path of statistics. It names the field.
    """
    typed.check(config_class, given, FILE, "restore the file from its source")
    if given.get("statistics") is not None:
        raise ValueError(
            f"{FILE}: statistics are not read from a file's config. Found {given['statistics']!r:.80}: delete the "
            "field, and set `config.statistics` yourself."
        )


def check_counts(config: Any, modules: int) -> None:
    """Refuses more patterns than the model has modules: each is tried on each.

    Raises:
        ValueError: it names the field.
    """
    for name in typed.PATTERNS:
        value = getattr(config, name)
        if value is not None and not isinstance(value, str) and len(value) > modules:
            raise ValueError(
                f"{FILE}: {name} may have as many entries as the model has modules, {modules}. Found {len(value)}: "
                "restore the file from its source."
            )
