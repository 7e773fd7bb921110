"""The data and the model of `peft-kasa sft`."""

from __future__ import annotations

from glob import escape
from pathlib import Path
from typing import Any

from datasets import load_dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, get_dataset, get_quantization_config

from ..calibration.calibrate import calibrate
from ..methods.method import SpectralConfig
from .models import load_model, tokenizer_of
from .sft_arguments import AdapterArguments

FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def rows(script: ScriptArguments, mixture: DatasetMixtureConfig, evaluate: bool) -> tuple[Any, Any]:
    """The training rows, and those to evaluate on or None.

    Raises:
        ValueError: there is no such file or split.
    """
    data = get_dataset(mixture) if mixture.datasets else _named(script)
    for name in (script.dataset_train_split, *([script.dataset_test_split] if evaluate else [])):
        if name not in data:
            raise ValueError(
                f"The dataset has no split {name!r}, but {', '.join(data)}. See --dataset_train_split and "
                "--dataset_test_split; --eval_strategy no needs no second one."
            )
    return data[script.dataset_train_split], data[script.dataset_test_split] if evaluate else None


def _named(script: ScriptArguments) -> Any:
    """A dataset of the Hub, of a folder, or of one file."""
    name, path = script.dataset_name or "", Path(script.dataset_name or "").expanduser()
    if path.suffix in FILES:
        if not path.is_file():
            raise ValueError(f"{name}: there is no such file. Give a file, a folder or a Hub id as --dataset_name.")
        files = {script.dataset_train_split: escape(str(path.absolute()))}  # `datasets` takes brackets for a pattern
        return load_dataset(FILES[path.suffix], data_files=files, streaming=script.dataset_streaming)
    return load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)


def begun(
    training: SFTConfig, base: ModelConfig, ours: AdapterArguments, config: SpectralConfig, train: Any
) -> tuple[Any, Any, Any]:
    """What SFTTrainer is to be given: a model or its name, a tokenizer or None, and how to quantise it or None.

    A config that starts from data has seen it then.
    """
    name, quantized = base.model_name_or_path or "", get_quantization_config(base)
    if not name.endswith(".gguf") and not config.needs:
        told: dict[str, Any] = {
            "revision": base.model_revision,
            "attn_implementation": base.attn_implementation,
            "dtype": base.dtype,
        }
        given: Any = training.model_init_kwargs or {}
        training.model_init_kwargs = told | given
        return name, None, quantized
    if quantized is not None:
        raise ValueError(
            "--load_in_4bit and --load_in_8bit need a folder or a Hub id, and a method that starts from weights. Found "
            f"{name} and {config.name}: call `calibrate` and SFTTrainer in Python."
        )
    model = load_model(name, base.dtype or "float32", "CAUSAL_LM", str(training.device))
    tokenizer = tokenizer_of(name)
    if config.needs:
        samples = ours.calibration_samples
        seen = list(train.take(samples))
        calibrate(model, seen, config, tokenizer=tokenizer, samples=samples, path=ours.statistics)
    return model, tokenizer, None
