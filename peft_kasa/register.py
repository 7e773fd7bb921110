"""Tells PEFT of the family. Idempotent."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import peft.peft_model
import safetensors.torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from .adapter.base.offload import check_not_offloaded
from .adapter.files import source
from .adapter.files.config_file import AdapterConfigFile
from .adapter.keys import is_slot
from .adapter.starting import give_up
from .adapter.tuner import SpectralModel
from .files import replacing
from .methods.method import require
from .peft_type import NAME, PREFIX
from .sharing import card, hub


def register() -> None:
    """Registers the type's config reader and tuner; its files are written whole or not at all, with a card of ours."""
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=AdapterConfigFile, model_cls=SpectralModel, prefix=PREFIX)
    elif known.__qualname__ != AdapterConfigFile.__qualname__:
        raise ImportError(f"PEFT has a method named {NAME} of its own ({known.__module__}). Upgrade peft_kasa.")
    if not hasattr(peft.peft_model.safe_save_file, "wraps"):
        peft.peft_model.safe_save_file = _whole(peft.peft_model.safe_save_file)
    _extend("create_or_update_model_card", _write_card)
    _extend("push_to_hub", _push)
    _extend("save_pretrained", _save)
    _extend("load_adapter", _load)


def _extend(name: str, ours: Callable[..., Any]) -> None:
    """Makes a method of PeftModel, for models with adapters of the family, `ours(theirs, model, ...)`."""
    theirs = getattr(peft.PeftModel, name)
    if hasattr(theirs, "wraps"):
        return

    @functools.wraps(theirs)
    def method(model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model.base_model, SpectralModel):
            return ours(theirs, model, *args, **kwargs)
        return theirs(model, *args, **kwargs)

    method.wraps = theirs  # type: ignore[attr-defined]
    setattr(peft.PeftModel, name, method)


_saved: ContextVar[list[str] | None] = ContextVar("saved", default=None)  # the adapters that a save is of


def _write_card(theirs: Any, model: Any, output_dir: str) -> None:
    """PEFT asks for the card before it writes the weights, so what is wrong with a card may not stop it."""
    try:
        card.write(output_dir, model, _saved.get() or list(model.peft_config))
    except Exception as error:
        warnings.warn(
            f"{os.path.join(output_dir, card.NAME)} was left as it is ({type(error).__name__}: {error}). Mend or "
            "delete it, and save again for a model card.",
            stacklevel=4,
        )


def _push(theirs: Any, model: Any, repo_id: str, **options: Any) -> str:
    return hub.push_adapters(model, repo_id, **options)


def _save(
    theirs: Any,
    model: Any,
    save_directory: str,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    rule = "safe_serialization has to be True: a pickle may run code when it is read, so none is loaded or written"
    require(safe_serialization, rule, safe_serialization)
    before = _saved.set(selected_adapters)
    try:
        theirs(model, save_directory, True, selected_adapters, *args, **kwargs)
    finally:
        _saved.reset(before)


def _load(theirs: Any, model: Any, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    check_not_offloaded(getattr(model, "hf_device_map", None), len(model.peft_config))
    try:
        if adapter_name in model.peft_config:  # no config is read then, and its reader does not check the weights
            source.check(model_id, **model._split_kwargs(kwargs)[0])
        return theirs(model, model_id, adapter_name, *args, **kwargs)
    except BaseException as error:
        give_up(model, adapter_name)
        if isinstance(error, KeyError) and str(error.args[0]).startswith("base_model."):  # of modules_to_save
            raise ValueError(
                f"{model_id}: the adapter's file lacks {error.args[0]}. Restore the file from its source."
            ) from None
        raise


def _whole(save: Any) -> Any:
    """PEFT writes an adapter's file in place, so that an interrupted save loses the old one too. It offers no hook."""

    def save_whole(tensors: dict[str, Any], filename: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        if not any(is_slot(key) for key in tensors):
            return save(tensors, filename, *args, **kwargs)
        with replacing(filename) as folder:
            safetensors.torch.save_file(tensors, os.path.join(folder, os.path.basename(filename)), *args, **kwargs)

    save_whole.wraps = save  # type: ignore[attr-defined]
    return save_whole
