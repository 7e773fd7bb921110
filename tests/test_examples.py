"""The examples run from their command line to their last check, on tiny models; with the real ones: `pytest -m real`."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import bases
import pytest
from orders import INSTRUCTION
from reviews import reviews
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
EXAMPLES = Path(importlib.import_module("chat").__file__ or "").parent
NUMBER = r"([-+\d.e]+)"


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What an example prints. It ends the process where one of its own checks fails."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    importlib.import_module(name).main()
    return capsys.readouterr().out


def numbers(pattern: str, text: str) -> list[float]:
    """Those in the place of each # of a pattern that occurs once."""
    (found,) = re.findall(re.escape(pattern).replace(r"\#", NUMBER), text)
    return [float(number) for number in ([found] if isinstance(found, str) else found)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a few words of the orders, so that answers are short."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random chat model."""
    folder = str(tmp_path_factory.mktemp("chat"))
    words = tokenizer()
    config = bases.fresh().config.to_dict() | {"vocab_size": len(words), "max_position_embeddings": 1024}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random encoder."""
    folder = str(tmp_path_factory.mktemp("encoder"))
    words = tokenizer()
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


TINY = {  # each with what makes it short
    "finetune": ["--steps", "2", "--method", "pissa"],
    "qlora": ["--steps", "2"],
    "corda_sft": ["--steps", "2"],
    "dpo": ["--steps", "2"],
    "federated": ["--clients", "2", "--rounds", "2", "--steps", "2", "--r", "8"],
    "several_adapters": ["--steps", "2"],
}
