"""Where an adapter's files come from, a folder or the Hub, and whether its weights may be read: safetensors alone."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


def check(source: str | os.PathLike[str], subfolder: str | None = None, **options: Any) -> None:
    """Makes sure that there is a whole safetensors file, before any model is touched. Reads its header only.

    Args:
        source: a folder, or a repository's id.
        subfolder: in it.
        options: of `hf_hub_download`.

    Raises:
        ValueError: there is none, or a pickled one instead, or it is damaged.
    """
    folder = os.path.join(source, subfolder or "")
    here = {name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if _holds(folder, name)}
    if not here:
        return check_readable(_fetched(os.fspath(source), {"subfolder": subfolder, **options}))
    if SAFETENSORS_WEIGHTS_NAME not in here:
        _refuse(folder, WEIGHTS_NAME in here)
    check_readable(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))


def check_readable(path: str) -> None:
    """Raises ValueError where a safetensors file is no whole one: its header has to fit its size."""
    try:
        with safe_open(path, framework="pt"):
            return
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or was cut short ({os.path.getsize(path)} bytes: {error}). Copy it again from its "
            "source, or use another checkpoint."
        ) from error


def _holds(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))


def _fetched(repo: str, options: dict[str, Any]) -> str:
    """Where the file lies once it is here: PEFT finds it in the cache then."""
    try:
        return hf_hub_download(repo, SAFETENSORS_WEIGHTS_NAME, **options)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        subfolder = options["subfolder"] or ""
        pickled = f"{subfolder}/{WEIGHTS_NAME}".removeprefix("/")
        known = {name: options[name] for name in ("revision", "token") if name in options}
        _refuse(os.path.join(repo, subfolder), file_exists(repo, pickled, **known))


def _refuse(where: str, pickled: bool) -> NoReturn:
    if not pickled:
        raise ValueError(f"{where} has no {SAFETENSORS_WEIGHTS_NAME}. Save the adapter again.")
    raise ValueError(
        f"{where} has its weights as a pickle ({WEIGHTS_NAME}), which may run code when it is read. peft_kasa loads "
        f"{SAFETENSORS_WEIGHTS_NAME} alone: load the file with the program that wrote it, and save the adapter with "
        "safe_serialization=True."
    )
