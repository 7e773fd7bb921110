"""Inside TRL's and transformers' trainers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import effect
import pytest
import torch
from bases import load, logits, move
from datasets import Dataset
from members import MEMBERS, Member
from peft import PeftModel, get_peft_model
from test_regularisers import _tokenizer
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_kasa.training import callback

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)

IDS = [[(7 * row + column) % 60 for column in range(8)] for row in range(16)]


def sft(model: Any, folder: Path, config: Any = None, optimizers: Any = (None, None), **given: Any) -> SFTTrainer:
    given = {"max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no", "logging_steps": 1, "bf16": False} | given
    arguments = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=2,
        **given,
    )
    rows = Dataset.from_dict({"input_ids": IDS})
    return SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=_tokenizer(), peft_config=config, optimizers=optimizers
    )


@each_member
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8"])
def test_sft_trains_saves_and_reloads(member: Member, kind: str, tiny: str, tmp_path: Path) -> None:
    trainer = sft(load(tiny, kind), tmp_path, member.config(dropout=0.1))
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    again = PeftModel.from_pretrained(load(tiny, kind), str(tmp_path / "out"))
    assert torch.equal(logits(again), logits(trainer.model))
    assert not torch.equal(logits(again), logits(load(tiny, kind)))


@each_member
def test_masters_stay_float32_through_trls_cast(
    member: Member, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> SFTTrainer:
        config = member.config(target_modules=["q_proj"], regularize=False)
        model = get_peft_model(load(tiny, "nf4"), config)
        move(model, 0.3)  # as after some training: away from zero, where bfloat16 is fine by itself
        return sft(model, tmp_path)

    trainer = build()
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert effect.travelled(trainer) == pytest.approx(1, abs=0.1)
    monkeypatch.setattr(callback, "restore_masters", lambda *_: None)
    assert effect.travelled(build()) < 0.7  # without it, bfloat16 masters stall


@each_member
def test_trls_cast_costs_a_reloaded_adapter_no_bit(member: Member, tiny: str, tmp_path: Path) -> None:
    model = get_peft_model(load(tiny, "nf4"), member.config())
    move(model)
    model.save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(load(tiny, "nf4"), str(tmp_path), is_trainable=True)
    expected = logits(model)
    assert torch.equal(logits(sft(model, tmp_path).model), expected)


@each_member
def test_resuming_gives_the_losses_of_an_uninterrupted_run(member: Member, tiny: str, tmp_path: Path) -> None:
    for kind in ("fp32", "nf4"):
        folder = tmp_path / kind
        given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        whole = sft(load(tiny, kind), folder, member.config(), **given)
        whole.train()
        again = sft(load(tiny, kind), folder, member.config(), **given)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        losses = [[e["loss"] for e in run.state.log_history if "loss" in e] for run in (whole, again)]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 4
        assert torch.equal(logits(whole.model), logits(again.model))


@each_member
def test_dpo_starts_with_an_exact_reference(member: Member, tiny: str, tmp_path: Path) -> None:
    """A ready PeftModel gets a "ref" adapter copied from it: at step 0 the two agree, so the loss is log 2."""
    model = get_peft_model(load(tiny), member.config())
    move(model)
    model.save_pretrained(str(tmp_path / "sft"))
    model = PeftModel.from_pretrained(load(tiny), str(tmp_path / "sft"), is_trainable=True)
    rows = Dataset.from_list([{"prompt": "1 2", "chosen": " 3 4", "rejected": " 9 8"}] * 4)
    arguments = DPOConfig(
        output_dir=str(tmp_path), max_steps=6, report_to="none", use_cpu=True, logging_steps=1, bf16=False,
        save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2, learning_rate=1e-2,
    )  # fmt: skip
    trainer = DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=_tokenizer())
    before = logits(model)
    trainer.train()
    assert "ref" in model.peft_config
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses[-1] < losses[0]
    model.set_adapter("ref")
    assert torch.equal(logits(model), before)


def test_a_trainer_warns_of_an_adapter_that_was_loaded_to_be_used(tiny: str, tmp_path: Path) -> None:
    get_peft_model(load(tiny), MEMBERS[0].config()).save_pretrained(str(tmp_path))
    for trainable in (False, True):
        model = PeftModel.from_pretrained(load(tiny), str(tmp_path), is_trainable=trainable)
        trainer = sft(model, tmp_path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        said = [str(each.message) for each in caught if "'default' learns" in str(each.message)]
        assert len(said) == (not trainable)
        assert all("with is_trainable=True" in text for text in said)


def test_a_trainer_without_the_family_is_left_alone(tiny: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), max_steps=1, logging_steps=1, report_to="none", use_cpu=True)
    trainer = Trainer(load(tiny), arguments, train_dataset=Dataset.from_dict({"input_ids": IDS, "labels": IDS}))
    trainer.train()
    assert all("penalty" not in entry for entry in trainer.state.log_history)
