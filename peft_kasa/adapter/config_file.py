"""What PEFT's registry calls to turn the fields of an adapter_config.json into the method's own config."""

from __future__ import annotations

import os
import warnings
import zipfile
from dataclasses import fields
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..methods.method import SpectralConfig, methods


class AdapterConfigFile(PeftConfig):
    """`AdapterConfigFile(method="kasa", r=8, ...)` is a `KaSAConfig`: one PEFT type, one config class a method."""

    def __new__(cls, method: str | None = None, **given: Any) -> SpectralConfig:  # type: ignore[misc]
        known = methods()
        if method not in known:
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
        config = config_class(**{name: value for name, value in given.items() if name in names})
        config.from_file = True  # type: ignore[misc]
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's; a local file of weights that cannot be read is refused before any model is touched."""
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if os.path.isfile(os.path.join(folder, CONFIG_NAME)):
            _check_readable(folder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)


def _check_readable(folder: str) -> None:
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    pickled = os.path.join(folder, WEIGHTS_NAME)
    try:
        if os.path.isfile(path):
            with safe_open(path, framework="pt"):
                return
        path = pickled
        if not os.path.isfile(path):
            raise ValueError(
                f"{folder} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}. Save the adapter again."
            )
        if not zipfile.is_zipfile(path):
            raise SafetensorError("not a whole zip file")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or was cut short ({os.path.getsize(path)} bytes: {error}). Copy it again from its "
            "source, or use another checkpoint."
        ) from error
