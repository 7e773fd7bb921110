"""What is said of a model or an adapter whose files cannot be read."""

from __future__ import annotations

import struct
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, PreTrainedConfig

AGAIN = "Copy it again from its source, or save it again."
UNREADABLE = (  # what readers raise of files that are not whole, or hold something else
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    SafetensorError,
)


def damaged(name: str, folder: str, options: dict[str, Any], error: Exception) -> ValueError:
    """The error for a model that cannot be read.

    Args:
        name: what the user calls it.
        folder: what transformers was given.
        options: further arguments for transformers.
        error: what it raised.
    """
    kind = _unknown_kind(folder, options)
    if kind is None:
        return ValueError(f"{name} cannot be loaded: {text_of(error)} {AGAIN}")
    return ValueError(
        f"{name}: config.json has model_type {kind!r}, which transformers {transformers.__version__} does not know. "
        "Update it (pip install -U transformers), or give a model that it knows."
    )


def text_of(error: Exception) -> str:
    """An error's text as a sentence. A KeyError's own is the key alone."""
    text = f"unknown {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return text.rstrip(". \n") + "."


def _unknown_kind(folder: str, options: dict[str, Any]) -> str | None:
    """The model_type of a model, if transformers has no such model."""
    try:
        kind = PreTrainedConfig.get_config_dict(folder, **options)[0].get("model_type")
    except UNREADABLE:
        return None
    return None if kind is None or kind in CONFIG_MAPPING else str(kind)
