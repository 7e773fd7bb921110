"""Parameter groups by slot: nothing twice, nothing lost, and what a Trainer makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bases import learning, load, logits, move
from members import FORMS, MEMBERS, Member
from peft import LoraConfig, PeftModel, get_peft_model
from test_trl import sft
from torch import nn

from peft_kasa import EVAConfig, KaSAConfig, PiSSAConfig, parameter_groups
from peft_kasa.adapter.starting import all_layers

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)
RATES = {"left_lr": 1e-4, "core_lr": 1e-2, "right_lr": 2e-4}


def rates(model: nn.Module) -> dict[str, float]:
    """The rate of each group by its name."""
    return {group["name"]: group["lr"] for group in parameter_groups(model, 3e-4, **RATES)}


@each_member
def test_each_slot_that_learns_has_its_group(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config())
    groups = {group["name"]: group["params"] for group in parameter_groups(model, 3e-4, **RATES)}
    assert tuple(groups) == tuple(slot for slot in ("left", "core", "right") if slot in member.learns)
    for slot, parameters in groups.items():
        wanted = [layer.slots("default")[slot] for layer in all_layers(model)]
        assert [id(parameter) for parameter in parameters] == [id(value) for value in wanted]
    assert rates(model) == {slot: RATES[f"{slot}_lr"] for slot in member.learns}


@each_member
def test_nothing_is_lost_and_nothing_is_twice(member: Member, tiny: str) -> None:
    """With a head, a tied copy of it, a bias, a norm and another adapter of PEFT beside the family's."""
    model = get_peft_model(load(tiny), member.config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    body = model.base_model.model.model
    body.norm.weight.requires_grad_(True)
    body.extra = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    body.again = body.extra[0]
    body.lora = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], r=2))
    groups = parameter_groups(model, 3e-4, **RATES, other_lr=5e-3, weight_decay=0.1)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(set(found)) == len(found)
    assert set(found) == {id(parameter) for parameter in learning(model)}
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    slots = {slot: (RATES[f"{slot}_lr"], 0.1) for slot in member.learns}
    assert settings == slots | {"other": (5e-3, 0.1), "other, no decay": (5e-3, 0.0)}
    undecayed = {id(parameter) for parameter in groups[-1]["params"]}
    norms = (*body.extra[1].parameters(), body.norm.weight)
    assert undecayed == {id(parameter) for parameter in (body.extra[0].bias, *norms)}


def test_a_rate_that_is_not_given_is_lr(tiny: str) -> None:
    model = get_peft_model(load(tiny), KaSAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    groups = parameter_groups(model, 3e-4, core_lr=1e-2)
    assert [group["lr"] for group in groups] == [3e-4, 1e-2, 3e-4, 3e-4]
    assert all(group["weight_decay"] == 0 for group in groups)


def test_all_adapters_that_learn_and_no_other(tiny: str) -> None:
    model = get_peft_model(load(tiny), KaSAConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("frozen", PiSSAConfig(r=2, target_modules=["q_proj"]))
    one = parameter_groups(model, 1e-4)
    model.base_model.set_adapter(["default", "frozen"])
    both = parameter_groups(model, 1e-4)
    assert [len(group["params"]) for group in one] == [2, 2, 2]  # two modules
    assert [len(group["params"]) for group in both] == [4, 2, 4]


def test_a_rate_may_be_numpys() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), KaSAConfig(r=2, target_modules=["0"]))
    groups = parameter_groups(model, np.float32(0.5), core_lr=np.float64(0.25))  # type: ignore[arg-type]
    assert [group["lr"] for group in groups] == [0.5, 0.25, 0.5]
    assert {type(group["lr"]) for group in groups} == {float}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0}, "lr has to be a finite number above 0. Found 0"),
        ({"lr": None}, "lr has to be a finite number above 0. Found None"),
        ({"lr": "1e-4"}, "lr has to be a finite number above 0. Found '1e-4'"),
        ({"lr": True}, "lr has to be a finite number above 0. Found True"),
        ({"lr": 1e-4, "core_lr": float("nan")}, "core_lr has to be .* Found nan"),
        ({"lr": 1e-4, "left_lr": -1.0}, "left_lr has to be .* Found -1.0"),
        ({"lr": 1e-4, "other_lr": float("inf")}, "other_lr has to be .* Found inf"),
        ({"lr": 1e-4, "weight_decay": -0.1}, "weight_decay has to be a finite number of at least 0. Found -0.1"),
    ],
)
def test_rates_out_of_range_are_refused(given: Any, message: str) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), KaSAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, **given)


def test_models_without_anything_of_the_family_to_learn_are_refused(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The model has no adapter of peft_kasa: wrap it with get_peft_model first"):
        parameter_groups(load(tiny), 1e-4)
    get_peft_model(load(tiny), KaSAConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"is_trainable=True"):
        parameter_groups(PeftModel.from_pretrained(load(tiny), str(tmp_path)), 1e-4)
    with pytest.raises(TypeError, match=r"Found SFTTrainer: of a trainer, give its `.model`"):
        parameter_groups(sft(load(tiny), tmp_path), 1e-4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Call calibrate"):
        parameter_groups(get_peft_model(load(tiny), EVAConfig(r=2, target_modules=["q_proj"])), 1e-4)


# In a trainer ---------------------------------------------------------------------------------------------------


def grouped(folder: str, out: Path, member: Member, kind: str, **given: Any) -> Any:
    """An SFTTrainer with rates by slot, on a model away from its start, where some slots have no gradient."""
    model = get_peft_model(load(folder, kind), member.config())
    move(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 3e-4, **RATES))
    return sft(model, out, optimizers=(optimizer, None), max_grad_norm=0.0, **given)


@each_member
def test_each_slot_moves_at_its_own_rate(member: Member, tiny: str, tmp_path: Path) -> None:
    """Adam's first step is the rate itself. On four bits TRL casts what learns after the optimiser was made."""
    trainer = grouped(tiny, tmp_path, member, "nf4", max_steps=1, lr_scheduler_type="constant")
    slots = [layer.slots("default") for layer in all_layers(trainer.model)]
    begun = [{slot: value[slot].detach().clone() for slot in member.learns} for value in slots]
    trainer.train()
    for slot in member.learns:
        moved = max((now[slot] - old[slot]).abs().max().item() for now, old in zip(slots, begun, strict=True))
        assert moved == pytest.approx(RATES[f"{slot}_lr"], rel=1e-2)
        assert all(now[slot].dtype == torch.float32 for now in slots)


def test_schedules_act_on_each_group(tiny: str, tmp_path: Path) -> None:
    given = {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_steps": 4, "save_strategy": "steps"}
    trainer = grouped(tiny, tmp_path, MEMBERS[0], "fp32", **given, save_steps=1)
    trainer.train()
    for step, factor in ((1, 0.5), (2, 1.0), (3, 0.5), (4, 0.0)):
        saved = torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt")["param_groups"]
        assert {group["name"]: group["lr"] for group in saved} == {
            slot: pytest.approx(factor * RATES[f"{slot}_lr"]) for slot in MEMBERS[0].learns
        }


@pytest.mark.parametrize("member", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_resuming_with_groups_is_exact(member: Member, kind: str, tiny: str, tmp_path: Path) -> None:
    given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = grouped(tiny, tmp_path, member, kind, **given)
    whole.train()
    again = grouped(tiny, tmp_path, member, kind, **given)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(whole.model), logits(again.model))
    assert [group["lr"] for group in again.optimizer.param_groups] == [0.0] * len(member.learns)
