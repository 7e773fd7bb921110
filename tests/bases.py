"""The bases that properties run on: a tiny Llama, stored in every way that the family supports."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace

import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peft_kasa import calibrate
from peft_kasa.adapter.files.statistics import Statistics
from peft_kasa.methods import methods

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "nf4 single": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
BASES = [*FLOATS, "nf4", "int8"]


def make(folder: str) -> None:
    """Saves the tiny model."""
    fresh().save_pretrained(folder)


def fresh() -> LlamaForCausalLM:
    """The tiny model in float32, from a fixed seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def stack() -> nn.Sequential:
    """Three linear layers, of 12 x 24, 20 x 12 and 20 x 20 with biases."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20))


@cache
def statistics(needs: str) -> Statistics:
    """What a data-driven member needs of the tiny model and of the stack, over random data."""
    rng = torch.get_rng_state()
    config_class = next(known for known in methods().values() if known.needs == needs)
    rows = [{"input_ids": tokens(1, 16, seed)[0]} for seed in range(16)]
    llama = calibrate(fresh(), rows, config_class(target_modules="all-linear"))
    inputs = torch.randn(16, 1, 8, 24, generator=torch.Generator().manual_seed(9))
    scored = calibrate(Scored(*stack()), [{"input": x} for x in inputs], config_class(target_modules=["0", "2", "4"]))
    torch.set_rng_state(rng)
    return Statistics.joined([llama, scored])


class Scored(nn.Sequential):
    """A stack that returns a loss, as models of transformers do."""

    def forward(self, input: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=super().forward(input).square().mean())


def load(folder: str, kind: str = "fp32") -> LlamaForCausalLM:
    """The model in evaluation mode, stored as `kind` says."""
    if kind in FLOATS:
        return LlamaForCausalLM.from_pretrained(folder, dtype=FLOATS[kind]).eval()
    quantization = QUANTIZED[kind]
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    ).eval()


def tokens(rows: int = 2, length: int = 8, seed: int = 0) -> torch.Tensor:
    """Token ids (rows, length)."""
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The model's logits in evaluation mode."""
    return model.eval()(input_ids=tokens() if ids is None else ids).logits


def move(model: nn.Module, size: float = 0.05, seed: int = 1) -> None:
    """Adds noise to everything that learns, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learning(model):
            parameter.add_(torch.empty(parameter.shape).normal_(0, size, generator=generator).to(parameter.dtype))


def learning(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that learn."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def steps(model: nn.Module, count: int = 3, lr: float = 1e-2) -> list[float]:
    """Trains with AdamW on fixed batches; the losses."""
    optimizer = torch.optim.AdamW(learning(model), lr=lr)
    model.train()
    losses = []
    for step in range(count):
        ids = tokens(seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
