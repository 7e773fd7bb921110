"""Tells PEFT of the family. Idempotent."""

from __future__ import annotations

import os
from typing import Any

import peft.peft_model
import safetensors.torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from ..files import replacing
from ..peft_type import NAME, PREFIX
from .config_file import AdapterConfigFile
from .tuner import SpectralModel


def register() -> None:
    """Registers the type's config reader and tuner, and makes its files be written whole or not at all."""
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=AdapterConfigFile, model_cls=SpectralModel, prefix=PREFIX)
    elif known.__qualname__ != AdapterConfigFile.__qualname__:
        raise ImportError(f"PEFT has a method named {NAME} of its own ({known.__module__}). Upgrade peft_kasa.")
    if not hasattr(peft.peft_model.safe_save_file, "wraps"):
        peft.peft_model.safe_save_file = _whole(peft.peft_model.safe_save_file)


def _whole(save: Any) -> Any:
    """PEFT writes an adapter's file in place, so that an interrupted save loses the old one too. It offers no hook."""

    def save_whole(tensors: dict[str, Any], filename: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        if not any(f".{PREFIX}" in key for key in tensors):
            return save(tensors, filename, *args, **kwargs)
        with replacing(filename) as folder:
            safetensors.torch.save_file(tensors, os.path.join(folder, os.path.basename(filename)), *args, **kwargs)

    save_whole.wraps = save  # type: ignore[attr-defined]
    return save_whole
