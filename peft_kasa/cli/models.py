"""Loading what a command line calls MODEL and ADAPTER."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..methods.method import SpectralConfig
from .hub import ADAPTER, MODEL, check_on_hub
from .unreadable import AGAIN, UNREADABLE, damaged, text_of

CLASSES = {  # by an adapter's task_type
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_model(name: str, dtype: str = "auto", task: str | None = None, device: str | None = None) -> PreTrainedModel:
    """A model with its weights, in evaluation mode.

    Args:
        name: a Hub id, a folder, or a GGUF file, which is read into plain weights (float32 unless `dtype` says).
        dtype: "auto" is as stored.
        task: an adapter's task_type: says which head the model has. None: the one that its config names.
        device: None: the CPU.

    Raises:
        ValueError: there is no such model, or it cannot be read. The message has the remedy.
    """
    folder, options = located(name)
    kind = torch.float32 if options and dtype == "auto" else dtype
    try:
        model = _class(folder, options, task).from_pretrained(folder, dtype=kind, **options)
    except UNREADABLE as error:
        raise damaged(name, folder, options, error) from error
    if options:  # the weights are plain ones now
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model.to(device or "cpu").eval()  # type: ignore[arg-type]


def load_config(name: str, **more: Any) -> Any:
    """A model's config, without its weights.

    Args:
        name: as for `load_model`.
        more: for transformers, such as a `revision`.

    Raises:
        ValueError: as `load_model`.
    """
    folder, options = located(name, more.get("revision"))
    try:
        return AutoConfig.from_pretrained(folder, **options, **more)
    except UNREADABLE as error:
        raise damaged(name, folder, options, error) from error


def located(name: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """What transformers is to be given for a model: a name, and further arguments for a GGUF file.

    Raises:
        ValueError: nothing that can be loaded lies there, here or on the Hub.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{name}: there is no such file. Give the path of a .gguf file.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} has no config.json. Give a folder that save_pretrained of a model has written.")
        return str(path), {}
    _check_hub_id(name, path, MODEL)
    check_on_hub(name, "config.json", revision)
    return name, {}


def load_adapter(adapter: str, base: str | None, dtype: str = "auto") -> PeftModel:
    """A saved adapter of the family on its base.

    Args:
        adapter: a folder or a Hub id.
        base: of the model; None: the one that the adapter's config names.

    Raises:
        ValueError: it is none of the family, or does not fit the base.
    """
    config = adapter_config(adapter)
    if not isinstance(config, SpectralConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"{adapter} is an adapter of type {kind}, none of this package. `peft-kasa convert` turns a LoRA into one."
        )
    return PeftModel.from_pretrained(load_base(config, base, adapter, dtype), adapter)


def load_base(config: Any, base: str | None, adapter: str, dtype: str = "auto") -> PreTrainedModel:
    """The base model of an adapter: what was given, or what the adapter's config says."""
    name = base_of(config, base, adapter)
    try:
        return load_model(name, dtype, config.task_type)
    except ValueError as error:
        if base is not None:
            raise
        raise ValueError(f"{adapter} names the base {name!r}. {error} Or give the base with --base.") from error


def adapter_config(adapter: str) -> Any:
    """The config of a saved adapter, of whatever type."""
    path = Path(adapter).expanduser()
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        raise ValueError(f"{adapter} has no {CONFIG_NAME}. {_instead(path)}")
    if not path.is_dir():
        _check_hub_id(adapter, path, ADAPTER)
        check_on_hub(adapter, CONFIG_NAME, local=ADAPTER)
    try:
        return PeftConfig.from_pretrained(adapter)
    except UNREADABLE as error:
        raise ValueError(f"{adapter}: {CONFIG_NAME} cannot be read: {text_of(error)} {AGAIN}") from error


def adapter_folder(adapter: str) -> str:
    """The folder of a saved adapter: its own, or where its files are put that come from the Hub."""
    if Path(adapter).expanduser().is_dir():
        return str(Path(adapter).expanduser())
    _check_hub_id(adapter, Path(adapter), ADAPTER)
    return snapshot_download(adapter, allow_patterns=[CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])


def base_of(config: Any, base: str | None, adapter: str) -> str:
    """The base model's name: what was given, or what the adapter's config says."""
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter} does not say which base model it is for. Give it with --base.")
    return name


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model, or None if it has none."""
    folder, options = located(name)
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError):
        return None


def _class(folder: str, options: dict[str, Any], task: str | None) -> Any:
    if task in CLASSES:
        return getattr(transformers, CLASSES[task])
    named = AutoConfig.from_pretrained(folder, **options).architectures or []
    return next((getattr(transformers, name) for name in named if hasattr(transformers, name)), AutoModelForCausalLM)


def _instead(folder: Path) -> str:
    """What to give in the place of a folder that holds no adapter itself."""
    held = sorted(str(config.parent) for config in folder.glob(f"*/{CONFIG_NAME}"))
    if not held:
        return "Give a folder that save_pretrained of an adapter has written."
    return f"It holds adapters in folders of their own: give one of {', '.join(held)}."


def _check_hub_id(name: str, path: Path, local: str) -> None:
    if path.is_file():
        raise ValueError(f"{name} is a file. Give {local}, or a Hub id (owner/name).")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or not name.strip("/"):
        raise ValueError(f"{name}: there is no such folder. Give {local}, or a Hub id (owner/name).")
