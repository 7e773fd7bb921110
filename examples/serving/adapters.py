"""The adapters that are served: trained for a few steps on orders.py, kept in a folder, exported as plain LoRA."""

from __future__ import annotations

import argparse
import gc
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from chat import load_tokenizer
from finetune import METHODS, load_base, train
from orders import train_and_held_out
from peft import PeftModel

from peft_kasa import LoraExport, export_lora

NAMES = ("kasa", "pissa", "lora_xs")
STEPS = 12  # of 4 rows: enough that the answers are no longer the base model's
BATCH = 4


@dataclass(frozen=True)
class Served:
    """One LoRA that servers load: `name` as requests call it, the adapter in `own`, the LoRA in its export's path."""

    name: str
    own: Path
    export: LoraExport

    @property
    def lora(self) -> Path:
        """The folder of the LoRA."""
        return Path(self.export.path)


def trained(name: str, model: str, folder: Path) -> Path:
    """The folder of a trained adapter, made if it is not there."""
    saved = folder / name / "adapter"
    if not (saved / "adapter_config.json").is_file():
        args = _settings(name, model, folder)
        print(f"Training {name}, {STEPS} steps ...", flush=True)
        rows, _ = train_and_held_out(STEPS * BATCH, 1, seed=0)
        train(load_base(args), load_tokenizer(model), rows, args).save_pretrained(saved)
        gc.collect()
    return saved


def exported(name: str, own: Path, model: str, rank: int | None = None) -> Served:
    """An adapter of the family as a LoRA beside it: exact, or the best of a rank."""
    adapted = load_adapted(model, own, torch.float32)
    export = export_lora(adapted, own.parent / name, rank=rank)
    return Served(name, own, export)


def load_adapted(model: str, adapter: Path, dtype: torch.dtype) -> PeftModel:
    """The base in `dtype` on the CPU, where the servers run, with an adapter of the family on it."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map="cpu").eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The base is not the one")  # stored in another dtype, on purpose
        return PeftModel.from_pretrained(base, adapter).eval()


def _settings(name: str, model: str, folder: Path) -> argparse.Namespace:
    _, rank, rate, _ = METHODS[name]
    return argparse.Namespace(
        method=name,
        model=model,
        load_in_4bit=False,
        r=rank,
        lr=rate,
        steps=STEPS,
        batch_size=BATCH,
        output=folder / name,
        seed=0,
    )
