"""Compact checkpoints by other loaders, beside other adapters, and over one that is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bases import load, logits, move, stack
from compacting import (
    DECOMPOSED,
    FREE,
    NAMES,
    altered,
    each_decomposed,
    each_member,
    each_variant,
    flipped,
    layers_of,
    output,
    rotated,
    same_slots,
    saved,
    slots_in,
)
from members import Member
from peft import PeftConfig, PeftModel, get_peft_model
from test_checkpoints import change
from torch import Tensor, nn

from peft_kasa import PiSSAConfig, SVFConfig, SVFTConfig

# Other loaders ----------------------------------------------------------------------------------------------------


@each_member
def test_transformers_loader_computes_the_frames_at_first_use(
    member: Member, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved(member, load(tiny), tmp_path)
    expected = logits(model)
    altered(monkeypatch, flipped)
    again = load(tiny)
    again.load_adapter(folder)
    for layer in layers_of(again):
        left_out = layer.slots("default").keys() - slots_in(folder)
        assert layer.adapters["default"].awaiting
        assert all(torch.isnan(layer.slots("default")[slot]).all() for slot in left_out)
    assert torch.equal(logits(again), expected)
    assert same_slots(model, again)
    if member in DECOMPOSED:
        monkeypatch.undo()
        altered(monkeypatch, rotated(0.01))
        again = load(tiny)
        again.load_adapter(folder)
        for _ in range(2):  # it stays refused
            with pytest.raises(ValueError, match=r"_proj: .*computed again"):
                logits(again)


@each_variant
def test_load_state_dict_computes_the_frames_at_first_use(member: Member, tmp_path: Path) -> None:
    model, folder = saved(member, stack(), tmp_path)
    expected = output(model)
    again = get_peft_model(stack(), PeftConfig.from_pretrained(folder))
    kept = {*slots_in(folder), "weight", "bias"}
    state = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[2] in kept}
    again.load_state_dict(state, strict=False)
    assert all(layer.adapters["default"].awaiting for layer in layers_of(again))
    assert torch.equal(output(again), expected)
    assert same_slots(model, again)
    whole = get_peft_model(stack(), PeftConfig.from_pretrained(folder))
    whole.load_state_dict(model.state_dict())
    assert torch.equal(output(whole), expected)


def test_half_a_file_is_refused_at_first_use(tmp_path: Path) -> None:
    for member in (FREE[1], FREE[6]):
        model, folder = saved(member, stack(), tmp_path / member.name)
        again = get_peft_model(stack(), PeftConfig.from_pretrained(folder))
        state = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[2] in member.learns}
        again.load_state_dict(state, strict=False)
        with pytest.raises(ValueError, match=r"0: the file of adapter 'default' did not give .*fingerprint"):
            output(again)


# Several ----------------------------------------------------------------------------------------------------------


@each_variant
def test_a_compact_adapter_beside_a_full_one(member: Member, tmp_path: Path) -> None:
    full = get_peft_model(stack(), PiSSAConfig(r=4, target_modules=NAMES))
    move(full, seed=3)
    full.save_pretrained(str(tmp_path))
    model, _ = saved(member, stack(), tmp_path / "second")
    again = PeftModel.from_pretrained(stack(), str(tmp_path))
    again.load_adapter(str(tmp_path / "second"), "second")
    for name, expected in (("second", output(model)), ("default", output(full))):
        again.set_adapter(name)
        assert torch.equal(output(again), expected)
    again.save_pretrained(str(tmp_path / "both"))
    assert slots_in(str(tmp_path / "both" / "second")) == slots_in(str(tmp_path / "second"))
    third = PeftModel.from_pretrained(stack(), str(tmp_path / "both" / "second"), adapter_name="mine")
    third.load_adapter(str(tmp_path / "both"), "other")
    assert torch.equal(output(third), output(model))
    third.delete_adapter("mine")
    third.set_adapter("other")
    assert torch.equal(output(third), output(full))


@each_decomposed
def test_a_refused_second_adapter_leaves_the_first(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved(member, stack(), tmp_path)
    expected = output(model)
    altered(monkeypatch, rotated(0.01))
    with pytest.raises(ValueError, match="computed again"):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model), expected)


@each_member
def test_a_base_with_an_adapter_merged_into_it_is_read_without(member: Member, tmp_path: Path) -> None:
    """PEFT unmerges before it loads; if it did not, the base would be another."""
    model, folder = saved(member, stack(), tmp_path)
    again = get_peft_model(stack(), PiSSAConfig(r=4, target_modules=NAMES), adapter_name="first")
    move(again, seed=3)
    again.merge_adapter()
    again.load_adapter(folder, "second")
    again.set_adapter("second")
    assert torch.equal(output(again), output(model))


# Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "gate"])
def test_svf_keeps_one_frame_of_two(form: str) -> None:
    def slots(config: SVFConfig | SVFTConfig, m: int, n: int) -> dict[str, Tensor]:
        return layers_of(get_peft_model(nn.Sequential(nn.Linear(n, m)), config))[0].slots("default")

    tall = slots(SVFConfig(target_modules=["0"], form=form), 96, 40)
    assert all(96 not in value.shape for value in tall.values())
    assert [tuple(value.shape) for value in tall.values() if value.numel() > 80] == [(40, 40)]
    sizes = [
        sum(value.numel() for value in slots(config, 96, 96).values())
        for config in (SVFConfig(target_modules=["0"], form=form), SVFTConfig(target_modules=["0"]))
    ]
    assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.03)


# Over an adapter that is there, and after a cast ---------------------------------------------------------------

each_framed = pytest.mark.parametrize("member", [member for member in FREE if member.name != "nlora"], ids=str)


@each_framed
def test_a_refused_file_leaves_the_trained_adapter_it_was_to_replace(member: Member, tmp_path: Path) -> None:
    model, folder = saved(member, stack(), tmp_path)
    expected = output(model)
    change(folder, lambda tensors: [value.add_(1) for key, value in tensors.items() if "anchor_" in key])
    with pytest.raises(ValueError, match=r"computed again"):
        model.load_adapter(folder, "default")
    assert torch.equal(output(model), expected)


@each_framed
def test_save_frames_may_be_switched_after_training(member: Member, tmp_path: Path) -> None:
    model, _ = saved(member, stack(), tmp_path / "compact")
    expected = output(model)
    for flag in (True, False, True):
        model.peft_config["default"].save_frames = flag
        model.save_pretrained(str(tmp_path / str(flag)))
        again = PeftModel.from_pretrained(stack(), str(tmp_path / str(flag)))
        assert torch.equal(output(again), expected)
        assert any("anchor_" in slot for slot in slots_in(str(tmp_path / str(flag)))) != flag
        model = again


@each_member
def test_a_cast_of_the_model_loses_nothing_of_the_adapter(member: Member, tmp_path: Path) -> None:
    base = stack().bfloat16()
    model, folder = saved(member, base, tmp_path)
    for layer in layers_of(model.bfloat16()):
        assert {value.dtype for value in layer.slots("default").values()} == {torch.float32}
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(stack().bfloat16(), folder).bfloat16()
    again.load_adapter(folder, "default")
    assert same_slots(again, model)
