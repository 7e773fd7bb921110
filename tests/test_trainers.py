"""Trainers for real, on a tiny model: what each changes, what it leaves alone, and what comes back from its file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import learning, load, logits, move, tokens
from datasets import Dataset
from members import FORMS, MEMBERS, Member
from peft import PeftModel, get_peft_model
from test_regularisers import DATA, _tokenizer
from test_trl import sft
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from peft_kasa.adapter.starting import all_layers

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)
each_form = pytest.mark.parametrize("member", FORMS, ids=str)
SHORT: dict[str, Any] = {
    "max_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none",
    "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 2,
}  # fmt: skip
PAIRS = Dataset.from_list([{"prompt": "1 2", "chosen": "1 2 3 4", "rejected": "1 2 9 8"}] * 4)


def train(trainer: Any, base: nn.Module) -> list[float]:
    """Trains; the losses. All are finite, all that learns has moved, and the base has the bits it had."""
    model = trainer.model
    before = [parameter.detach().clone() for parameter in learning(model)]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses
    assert all(map(math.isfinite, losses))
    assert all(not torch.equal(now, begun) for now, begun in zip(learning(model), before, strict=True))
    for layer in all_layers(model):
        weight = base.get_submodule(layer.name.removeprefix("base_model.model.")).weight
        assert torch.equal(layer.base.matrix(), weight)
    return losses


def causal(trainer: Any, folder: str, out: Path) -> list[float]:
    """`train`, and the file gives the same logits."""
    losses = train(trainer, load(folder))
    trainer.save_model(str(out / "saved"))
    again = PeftModel.from_pretrained(load(folder), str(out / "saved"))
    assert torch.equal(logits(again), logits(trainer.model))
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(load(folder)))
    return losses


def adapted(member: Member, folder: str, kind: str = "fp32", **given: Any) -> PeftModel:
    """A model with an adapter away from its start, where some slots have no gradient."""
    model = get_peft_model(load(folder, kind), member.config(**given))
    move(model)
    return model


@each_member
def test_transformers_trainer(member: Member, tiny: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), gradient_accumulation_steps=2, **SHORT)
    causal(Trainer(adapted(member, tiny), arguments, train_dataset=DATA), tiny, tmp_path)


@pytest.mark.parametrize(
    ("member", "strategy"), [(m, "bfd") for m in MEMBERS] + [(m, "wrapped") for m in FORMS], ids=str
)
def test_sft_packed_and_accumulated(member: Member, strategy: str, tiny: str, tmp_path: Path) -> None:
    given = {**SHORT, "packing": True, "max_length": 16, "gradient_accumulation_steps": 2}
    del given["report_to"], given["use_cpu"], given["disable_tqdm"], given["per_device_train_batch_size"]
    trainer = sft(adapted(member, tiny), tmp_path, packing_strategy=strategy, **given)
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {16}  # two rows of 8 in each
    causal(trainer, tiny, tmp_path)


@each_form
def test_sft_on_completions_only(member: Member, tiny: str, tmp_path: Path) -> None:
    """What is asked for does not count: another prompt of other labels would, another completion does."""
    rows = Dataset.from_list([{"prompt": "1 2 3", "completion": " 4 5"}] * 4)
    arguments = SFTConfig(str(tmp_path), completion_only_loss=True, bf16=False, **SHORT)
    trainer = SFTTrainer(adapted(member, tiny), arguments, train_dataset=rows, processing_class=_tokenizer())
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert (labels[:, :3] == -100).all()
    assert labels[:, 3:].tolist() == [[4, 5, 63]] * 2
    losses = causal(trainer, tiny, tmp_path)
    assert losses[1] < losses[0]


def gradients(model: nn.Module) -> list[Tensor]:
    """Of a step, by all that learns."""
    loss = model.train()(input_ids=tokens(), labels=tokens()).loss
    return list(torch.autograd.grad(loss, list(learning(model))))


@each_member
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(member: Member, reentrant: bool, tiny: str) -> None:
    for kind in ("fp32", "nf4") if member in FORMS or member.name == "svf" else ("fp32",):
        model = adapted(member, tiny, kind)
        expected = gradients(model)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        for parameter, gradient in zip(learning(model), expected, strict=True):
            assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max())


@each_form
@pytest.mark.parametrize("reentrant", [True, False])
def test_sft_with_gradient_checkpointing(member: Member, reentrant: bool, tiny: str, tmp_path: Path) -> None:
    """The same losses as without."""
    found = []
    for on in (True, False):
        kwargs = {"use_reentrant": reentrant} if on else None
        given = {"gradient_checkpointing": on, "gradient_checkpointing_kwargs": kwargs, "max_steps": 3}
        trainer = sft(adapted(member, tiny), tmp_path, **given)
        found.append(causal(trainer, tiny, tmp_path))
    assert found[0] == pytest.approx(found[1], abs=2e-4)  # logs are rounded to four digits


def every_other(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group, whatever was sampled: equal ones give no gradient."""
    return [float(index % 2) for index in range(len(completions))]


@each_member
def test_grpo(member: Member, tiny: str, tmp_path: Path) -> None:
    """Without a "ref" adapter the reference is the base; a ready adapter gets one, at zero KL."""
    arguments = GRPOConfig(
        str(tmp_path), num_generations=2, max_completion_length=8, beta=0.1, bf16=False, seed=3, **SHORT
    )
    rows = Dataset.from_list([{"prompt": "1 2 3"}, {"prompt": "7 9"}] * 2)
    model = adapted(member, tiny)
    before = logits(model)
    trainer = GRPOTrainer(model, every_other, arguments, train_dataset=rows, processing_class=_tokenizer())
    causal(trainer, tiny, tmp_path)
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-7)
    assert kl[1] > 0
    assert not any(layer.merged for layer in all_layers(model))
    model.set_adapter("ref")
    assert torch.equal(logits(model), before)


def scorer(folder: str) -> LlamaForSequenceClassification:
    """The tiny model with a head of one score."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.config.pad_token_id = 63
    return model.eval()


@each_member
def test_reward_model_with_its_head(member: Member, tiny: str, tmp_path: Path) -> None:
    config = member.config(task_type="SEQ_CLS", modules_to_save=["score"])
    model = get_peft_model(scorer(tiny), config)
    move(model)
    arguments = RewardConfig(str(tmp_path), bf16=False, **SHORT)
    trainer = RewardTrainer(model, arguments, train_dataset=PAIRS, processing_class=_tokenizer())
    losses = train(trainer, scorer(tiny))
    assert losses[1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(scorer(tiny), str(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(model))
    head = again.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(head, model.base_model.model.score.modules_to_save["default"].weight)
    assert not torch.equal(head, scorer(tiny).score.weight)


def dpo(model: Any, out: Path, config: Any = None) -> DPOTrainer:
    arguments = DPOConfig(str(out), bf16=False, **SHORT)
    return DPOTrainer(model, args=arguments, train_dataset=PAIRS, processing_class=_tokenizer(), peft_config=config)


@each_member
def test_dpo_of_a_fresh_adapter_starts_with_an_exact_reference(member: Member, tiny: str, tmp_path: Path) -> None:
    trainer = dpo(get_peft_model(load(tiny), member.config()), tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@each_form
def test_dpos_reference_is_the_base_where_trl_adds_the_adapter(member: Member, tiny: str, tmp_path: Path) -> None:
    trainer = dpo(load(tiny), tmp_path, member.config())
    assert list(trainer.model.peft_config) == ["default"]
    trainer.train()
    at_start = trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert at_start == member.identity
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(load(tiny)))
