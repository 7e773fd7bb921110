"""What tests of `peft-kasa` share: a folder to work in, and a way to run a command."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import bases
import pytest
from peft import LoraConfig, get_peft_model
from test_docs import tokenizer

from peft_kasa import KaSAConfig
from peft_kasa_cli import main

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
FILES = {"base": {"config.json", "model.safetensors"}, **dict.fromkeys(("kasa", "lora", "pissa"), ADAPTER)}
ADAPTERS: dict[str, Any] = {
    "kasa": KaSAConfig(r=4, target_modules="all-linear"),
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"]),
    "niter": LoraConfig(r=4, init_lora_weights="pissa_niter_4", target_modules=["q_proj"]),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]),
}


class Done(NamedTuple):
    """What a command has printed."""

    out: str
    err: str


def call(capfd: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Done:
    """Runs a command in this process, and checks its exit code."""
    capfd.readouterr()
    found = main(words)
    done = Done(*capfd.readouterr())
    assert found == code, done.err
    return done


def make(folder: Path) -> Path:
    """A base with its tokenizer, adapters that have moved from their starts, and data."""
    base = str(folder / "base")
    bases.make(base)
    tokenizer().save_pretrained(base)
    for name, config in ADAPTERS.items():
        model = get_peft_model(bases.load(base), deepcopy(config))
        bases.move(model)
        model.save_pretrained(str(folder / name))
    cut_short(folder / "kasa", folder / "cut-short")
    rows = [{"prompt": "a b c", "completion": " d e f"}, {"prompt": "g h", "completion": " i j"}] * 8
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def cut_short(source: Path, target: Path) -> None:
    """An adapter whose file was not copied to its end."""
    target.mkdir()
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    whole = (source / "adapter_model.safetensors").read_bytes()
    (target / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
