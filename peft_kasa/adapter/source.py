"""Where an adapter's files come from, a folder or the Hub, and whether its weights may be read: safetensors alone."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
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
    if os.path.isdir(folder):
        path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if not os.path.isfile(path):
            _refuse(folder, os.path.isfile(os.path.join(folder, WEIGHTS_NAME)))
    else:
        path = _fetched(os.fspath(source), subfolder, options)
    check_readable(path)


def check_readable(path: str | os.PathLike[str]) -> None:
    """Makes sure that a safetensors file is whole: its header fits its size.

    Raises:
        ValueError: it is not.
    """
    try:
        with safe_open(path, framework="pt"):
            return
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or was cut short ({os.path.getsize(path)} bytes: {error}). Copy it again from its "
            "source, or use another checkpoint."
        ) from error


def _fetched(repo: str, subfolder: str | None, options: dict[str, Any]) -> str:
    """Where the file lies once it is here: PEFT finds it in the cache then."""
    fetch = {**options, "subfolder": subfolder}
    try:
        return hf_hub_download(repo, SAFETENSORS_WEIGHTS_NAME, **fetch)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        where = os.path.join(repo, subfolder or "")
        return _refuse(where, _exists(repo, fetch))


def _exists(repo: str, fetch: dict[str, Any]) -> bool:
    try:
        return bool(hf_hub_download(repo, WEIGHTS_NAME, **fetch, dry_run=True))
    except EntryNotFoundError:
        return False


def _refuse(where: str, pickled: bool) -> Any:
    if not pickled:
        raise ValueError(f"{where} has no {SAFETENSORS_WEIGHTS_NAME}. Save the adapter again.")
    raise ValueError(
        f"{where} has its weights as a pickle ({WEIGHTS_NAME}), which may run code when it is read. peft_kasa loads "
        f"{SAFETENSORS_WEIGHTS_NAME} alone: load the file with the program that wrote it, and save the adapter with "
        "safe_serialization=True."
    )
