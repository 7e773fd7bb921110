"""An adapter that waits for statistics of data: it says so wherever values are needed, and is in nobody's way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import bases
import pytest
import torch
from bases import load, logits, move
from members import MEMBERS, Member
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from test_trl import sft
from torch import nn

from peft_kasa import PiSSAConfig, SpectralLinear, calibrate, export_lora, penalty, to_lora

WAITING = [member for member in MEMBERS if member.config_class.needs]
TARGETS = ["q_proj", "down_proj"]
each_member = pytest.mark.parametrize("member", WAITING, ids=str)
ASKED = r"self_attn\.q_proj: adapter '{}' \({}\) starts from {} of data and has seen none\. Call calibrate\(model, data"
TO_TRAIN = r"\. Where a trainer makes the adapter: calibrate\(model, data, config\), before the trainer is made"


def waiting(member: Member, base: nn.Module, name: str = "default") -> PeftModel:
    return get_peft_model(base, member.config(statistics=None, target_modules=TARGETS), adapter_name=name)


def says(member: Member, name: str = "default") -> str:
    return ASKED.format(name, member.name, member.config_class.needs)


def layers_of(model: nn.Module) -> list[SpectralLinear]:
    return [module for module in model.modules() if isinstance(module, SpectralLinear)]


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": bases.tokens(1, 16, seed)[0]} for seed in range(4)]


def is_waiting(model: nn.Module, name: str = "default") -> bool:
    slots = [value for layer in layers_of(model) for value in layer.slots(name).values()]
    return all(layer.adapters[name].uncalibrated for layer in layers_of(model)) and all(
        torch.isnan(value).all() for value in slots
    )


USES: dict[str, Callable[[PeftModel, str], object]] = {
    "forward": lambda model, folder: logits(model),
    "training": lambda model, folder: model.train()(input_ids=bases.tokens(), labels=bases.tokens()),
    "generate": lambda model, folder: model.generate(input_ids=bases.tokens(), max_new_tokens=2),
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "state dict": lambda model, folder: get_peft_model_state_dict(model),
    "merge": lambda model, folder: model.merge_adapter(),
    "merge and unload": lambda model, folder: model.merge_and_unload(),
    "layer's merge": lambda model, folder: layers_of(model)[0].merge(),
    "export": lambda model, folder: export_lora(model, folder),
    "to_lora": lambda model, folder: to_lora(model),
    "update": lambda model, folder: layers_of(model)[0].get_delta_weight("default"),
    "value": lambda model, folder: layers_of(model)[0].value("default"),
}


@each_member
@pytest.mark.parametrize("use", USES)
def test_every_use_says_what_to_do(member: Member, use: str, tiny: str, tmp_path: Path) -> None:
    model = waiting(member, load(tiny))
    with pytest.raises(ValueError, match=says(member)):
        USES[use](model, str(tmp_path))
    assert is_waiting(model)
    assert not any(layer.merged for layer in layers_of(model))
    assert not any(name.startswith("adapter_model") for name in os.listdir(tmp_path))


@each_member
def test_a_trainer_says_so_at_its_first_step(member: Member, tiny: str, tmp_path: Path) -> None:
    for build in (
        lambda: sft(load(tiny), tmp_path, member.config(statistics=None, target_modules=TARGETS)),
        lambda: sft(waiting(member, load(tiny)), tmp_path),
    ):
        trainer = build()
        with pytest.raises(ValueError, match=f"{says(member)}.*{TO_TRAIN}"):
            trainer.train()
        assert is_waiting(trainer.model)


@each_member
@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_disabled_it_is_the_base(member: Member, kind: str, tiny: str) -> None:
    expected = logits(load(tiny, kind))
    model = waiting(member, load(tiny, kind))
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=says(member)):
        logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@each_member
def test_calibrated_it_works_after_all(member: Member, tiny: str, tmp_path: Path) -> None:
    model = waiting(member, load(tiny))
    with pytest.raises(ValueError, match=says(member)):
        logits(model)
    calibrate(model, rows())
    assert not any(layer.adapters["default"].uncalibrated for layer in layers_of(model))
    direct = load(tiny)
    config = member.config(statistics=None, target_modules=TARGETS)
    calibrate(direct, rows(), config)
    assert torch.equal(logits(model), logits(get_peft_model(direct, config)))
    move(model)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(load(tiny), str(tmp_path))), logits(model))


@each_member
def test_another_adapter_is_added_loaded_and_used_beside_it(member: Member, tiny: str, tmp_path: Path) -> None:
    alone = get_peft_model(load(tiny), PiSSAConfig(r=4, target_modules=TARGETS))
    move(alone)
    alone.save_pretrained(str(tmp_path))
    model = waiting(member, load(tiny))
    model.add_adapter("added", PiSSAConfig(r=4, target_modules=TARGETS))
    model.load_adapter(str(tmp_path), "loaded")
    assert is_waiting(model)
    model.set_adapter("added")
    move(model)
    assert torch.equal(logits(model), logits(alone))
    bases.steps(model, 1)
    model.set_adapter("loaded")
    assert torch.equal(logits(model), logits(alone))
    model.set_adapter("default")
    with pytest.raises(ValueError, match=says(member)):
        logits(model)
    model.delete_adapter("default")
    model.set_adapter("loaded")
    assert torch.equal(logits(model), logits(alone))
    model.save_pretrained(str(tmp_path / "both"))


@each_member
def test_it_is_added_beside_a_trained_one(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), PiSSAConfig(r=4, target_modules=TARGETS))
    move(model)
    expected = logits(model)
    model.add_adapter("later", member.config(statistics=None, target_modules=TARGETS))
    assert is_waiting(model, "later")
    assert torch.equal(logits(model), expected)
    model.base_model.set_adapter(["default", "later"])
    with pytest.raises(ValueError, match=says(member, "later")):
        logits(model)
    calibrate(model, rows(), "later")
    assert torch.isfinite(logits(model)).all()
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


@each_member
def test_deleted_it_leaves_nothing(member: Member, tiny: str) -> None:
    base = load(tiny)
    model = waiting(member, base, "mine")
    model.add_adapter("other", PiSSAConfig(r=4, target_modules=TARGETS))
    model.delete_adapter("mine")
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(load(tiny)))  # PiSSA starts there
    assert not any("mine" in name for name, _ in model.named_parameters())


def test_a_penalty_of_what_waits_is_not_nan(tiny: str) -> None:
    model = waiting(WAITING[0], load(tiny))
    assert penalty(model).item() == 0.0


@each_member
def test_a_copy_waits_too(member: Member, tiny: str) -> None:
    import copy
    import pickle

    model = waiting(member, load(tiny))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_waiting(twin)
        with pytest.raises(ValueError, match=says(member)):
            logits(twin)
        calibrate(twin, rows())
        assert torch.isfinite(logits(twin)).all()
    assert is_waiting(model)
