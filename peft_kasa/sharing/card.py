"""The model card of adapters of the family: metadata that the Hub reads, and one part of the text, which is ours."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModelForCausalLM
from transformers import PreTrainedModel

from ..methods.method import require
from .card_text import text
from .export import LoraExport

NAME = "README.md"
BEGIN = "<!-- peft_kasa: what follows is written anew at each save, up to the mark of its end. -->"
END = "<!-- peft_kasa: end. Text outside of the two marks is yours. -->"
OURS = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)


def write(
    folder: str | os.PathLike[str],
    model: Any,
    adapters: Sequence[str],
    where: str = "",
    lora: LoraExport | None = None,
    metrics: Sequence[EvalResult] = (),
    tags: Sequence[str] = (),
    root: str = "default",
) -> None:
    """Writes README.md, or brings the one that is there up to date: metadata, and the part between our marks.

    Args:
        folder: of the adapter.
        model: a PeftModel.
        adapters: the names of those that the folder holds.
        where: what users load from: the repository's id. "": the folder's name.
        lora: of the export in the folder's `lora/`, if there is one.
        metrics: results, which replace those of the same task, dataset and metric.
        tags: to add.
        root: the adapter whose files are in the folder itself; others are in folders of their names below it.

    Raises:
        ValueError: if `metrics` are not `huggingface_hub.EvalResult`.
    """
    for result in metrics:
        rule = "metrics have to be huggingface_hub.EvalResult, which name task, dataset and metric"
        require(isinstance(result, EvalResult), rule, result)
    path = os.path.join(folder, NAME)
    card = ModelCard.load(path) if os.path.exists(path) else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    name = where or os.path.basename(os.path.abspath(folder))
    base = base_id(model)
    data: Any = card.data
    _update(data, model, adapters, base, tags)
    _add_results(data, name, metrics)
    ours = f"{BEGIN}\n{text(model, adapters, base, name, lora, data.eval_results or (), root)}\n{END}"
    found = OURS.search(card.text)
    card.text = OURS.sub(lambda _: ours, card.text, count=1) if found else _after(card.text, name, ours)
    card.save(path)


def mentions_lora(folder: str | os.PathLike[str]) -> bool:
    """Whether our part of a folder's card says that there is an export."""
    path = os.path.join(folder, NAME)
    found = OURS.search(ModelCard.load(path).text) if os.path.exists(path) else None
    return found is not None and 'subfolder="lora"' in found[0]


def base_id(model: Any) -> str:
    """The base model's id on the Hub, or "": a path of this machine is of no use to others."""
    known = getattr(getattr(model.get_base_model(), "config", None), "_name_or_path", None) or ""
    try:
        validate_repo_id(known)
    except HFValidationError:
        return ""
    return "" if os.path.exists(known) else known


def _update(data: ModelCardData, model: Any, adapters: Sequence[str], base: str, tags: Sequence[str]) -> None:
    data.library_name = "peft"
    added = ["peft_kasa", *(model.peft_config[adapter].name for adapter in adapters), *tags]
    if isinstance(model.get_base_model(), PreTrainedModel):
        added.append("transformers")
    if base:
        data.base_model = base
        added.append(f"base_model:adapter:{base}")
    data.tags = list(dict.fromkeys([*(data.tags or []), *added]))
    if isinstance(model, PeftModelForCausalLM):
        data.pipeline_tag = data.pipeline_tag or "text-generation"


def _add_results(data: ModelCardData, name: str, metrics: Sequence[EvalResult]) -> None:
    if metrics:
        before = data.eval_results or []
        kept = [old for old in before if not any(old.is_equal_except_value(new) for new in metrics)]
        data.eval_results = [*kept, *metrics]
        data.model_name = data.model_name or name.rpartition("/")[2]


def _after(own: str, name: str, ours: str) -> str:
    """The user's text, or a title where there is none, and our part."""
    title = "# " + name.rpartition("/")[2]
    return f"{own.strip() or title}\n\n{ours}\n"
