"""What PEFT's registry calls to turn the fields of an adapter_config.json into the method's own config."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

from peft import PeftConfig

from ...methods.method import SpectralConfig, methods
from . import file_fields, source


class AdapterConfigFile(PeftConfig):
    """`AdapterConfigFile(method="kasa", r=8, ...)` is a `KaSAConfig`: one PEFT type, one config class a method."""

    def __new__(cls, method: str | None = None, **given: Any) -> SpectralConfig:  # type: ignore[misc]
        known = methods()
        if not isinstance(method, str) or method not in known:
            raise ValueError(
                f"adapter_config.json: `method` has to be one of {', '.join(sorted(known))}. Found {method!r}: upgrade "
                "peft_kasa, or import the package that defines it."
            )
        config_class = known[method]
        names = {field.name for field in fields(config_class)}
        if unknown := sorted(given.keys() - names):
            warnings.warn(
                f"adapter_config.json: {', '.join(unknown)} of {config_class.__name__} is not known to this version of "
                "peft_kasa and is ignored. Upgrade it.",
                stacklevel=3,
            )
        given = {name: value for name, value in given.items() if name in names}
        file_fields.check(config_class, given)
        config = config_class(**given)
        config.from_file = True  # type: ignore[misc]
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's; weights that cannot be read, or are a pickle, are refused before any model is touched."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        source.check(pretrained_model_name_or_path, subfolder, **cls._split_kwargs(kwargs)[0])
        return config
