"""Pushing adapters to the Hub: native files at the root, a plain LoRA beside them, and a card that says how to load."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..adapter.starting import adapted
from ..methods.method import require
from . import card
from .export import LoraExport, export_lora

LORA = "lora"  # the folder of the export


def push_to_hub(
    model: Any,
    repo_id: str,
    adapter: str = "default",
    lora: bool = True,
    rank: int | None = None,
    metrics: Sequence[EvalResult] = (),
    **options: Any,
) -> str:
    """Pushes one adapter to the Hub: its own files at the root, as a plain LoRA in `lora/`, and a model card.

    Users without this package load `PeftModel.from_pretrained(base, repo_id, subfolder="lora")`. A card that is there
    keeps its text: its metadata and the part between our marks are brought up to date.

    Args:
        model: a PeftModel.
        repo_id: "owner/name", made if need be.
        adapter: its name. Whatever it is, its files go to the root.
        lora: whether to add the export. False removes one that an earlier push made: it would be of other weights.
        rank: of the export, see `export_lora`. None: exact.
        metrics: for the card and its metadata.
        options: private, token, revision, create_pr, commit_message, commit_description and tags, as in transformers.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: an unknown adapter, or one without a LoRA that servers take; `rank=` or `lora=False` help. Nothing
            has been pushed then.

    Examples:
        >>> from peft_kasa import push_to_hub
        >>> push_to_hub(model, "me/kasa-smollm2")  # doctest: +SKIP
    """
    adapted(model, adapter)
    with tempfile.TemporaryDirectory() as made:
        model.save_pretrained(made, selected_adapters=[adapter])
        folder = made if adapter == "default" else os.path.join(made, adapter)
        report = _export(model, os.path.join(folder, LORA), adapter, rank) if lora else None
        return _push(model, folder, repo_id, [adapter], report, metrics, adapter, **options)


def push_adapters(model: Any, repo_id: str, **options: Any) -> str:
    """`model.push_to_hub(repo_id)`: all adapters as `save_pretrained` lays them out, and their card; no export.

    transformers' own puts an empty template in the place of the card that PEFT has written.
    """
    rule = f"an adapter named {LORA!r} would lie where the export does: push it with peft_kasa.push_to_hub(adapter=...)"
    require(LORA not in model.peft_config, rule, list(model.peft_config))
    options.pop("max_shard_size", None)  # of models: an adapter is one file
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return _push(model, folder, repo_id, list(model.peft_config), **options)


def _export(model: Any, path: str, adapter: str, rank: int | None) -> LoraExport:
    """Uniform for servers, unless it trains more than servers take in a LoRA: PEFT loads that."""
    return export_lora(model, path, adapter, rank, uniform=not model.peft_config[adapter].beyond)


def _push(
    model: Any,
    folder: str,
    repo_id: str,
    adapters: list[str],
    lora: LoraExport | None = None,
    metrics: Sequence[EvalResult] = (),
    root: str = "default",
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] | None = None,
) -> str:
    api, methods = HfApi(token=token), ", ".join(model.peft_config[name].name for name in adapters)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    _fetch_card(folder, repo_id, revision, token)
    stale = f"{LORA}/*" if lora is None and card.mentions_lora(folder) else None
    card.write(folder, model, adapters, repo_id, lora, metrics, tags or (), root)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        create_pr=create_pr,
        delete_patterns=stale,
        commit_message=commit_message or f"Upload {methods} adapter",
        commit_description=commit_description,
    )


def _fetch_card(folder: str, repo_id: str, revision: str | None, token: bool | str | None) -> None:
    """Puts the card that the repository has, if any, in the place of a fresh one."""
    path = os.path.join(folder, card.NAME)
    try:  # afresh: an old copy would take back what was written on the Hub since
        found = hf_hub_download(repo_id, card.NAME, revision=revision, token=token, force_download=True)
        shutil.copyfile(found, path)
    except LocalEntryNotFoundError:  # the Hub was not reached: that says nothing of the card
        raise
    except EntryNotFoundError:
        if os.path.exists(path):
            os.remove(path)
