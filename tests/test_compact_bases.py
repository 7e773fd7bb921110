"""Compact checkpoints on other bases, and frames that come out otherwise."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from bases import FLOATS, load, logits, stack
from compacting import (
    FREE,
    SIGNLESS,
    STORAGES,
    altered,
    each_decomposed,
    each_member,
    each_storage,
    each_variant,
    flipped,
    is_refused,
    layers_of,
    output,
    refusal,
    rotated,
    same_slots,
    saved,
)
from members import Member
from peft import PeftModel
from test_checkpoints import change
from torch import Tensor, nn

from peft_kasa.adapter.files import anchors

# Other bases ------------------------------------------------------------------------------------------------------


@each_member
@each_storage
def test_another_storage_is_refused(member: Member, kind: str, tiny: str, tmp_path: Path) -> None:
    """Where a full checkpoint would load with a warning: without frames, what is learnt would act on others."""
    _, compact = saved(member, load(tiny, kind), tmp_path / "compact", target_modules=["q_proj"])
    for other in STORAGES:
        if other != kind:
            remedy = "Load the base as it was trained on, or save the adapter with save_frames=True"
            with pytest.raises(ValueError, match=rf"layers\.0\.self_attn\.q_proj: .*holds no frames.*{remedy}"):
                PeftModel.from_pretrained(load(tiny, other), compact)


@each_variant
@pytest.mark.parametrize(("made", "used"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp16")])
def test_another_storage_of_the_same_numbers_is_right(member: Member, made: str, used: str, tmp_path: Path) -> None:
    """A base in bfloat16 is the same in float32, and back: the frames are those that were trained beside."""

    def base(kind: str) -> nn.Module:
        model = stack().bfloat16()
        for parameter in model.parameters():
            parameter.data[parameter.data.abs() < 2.0**-6] = 0.0  # float16 has bfloat16's digits, but not its range
        return model.to(FLOATS[kind])

    for save_frames in (False, True):
        saved(member, base(made), tmp_path / str(save_frames), save_frames=save_frames)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        compact, full = (PeftModel.from_pretrained(base(used), str(tmp_path / flag)) for flag in ("False", "True"))
    for ours, theirs in zip(layers_of(compact), layers_of(full), strict=True):
        assert all(torch.equal(ours.slots("default")[slot], value) for slot, value in theirs.slots("default").items())
    x = torch.ones(2, 24, dtype=FLOATS[used])
    assert torch.equal(compact(x), full(x))


@each_variant
def test_another_model_of_the_same_shape_is_refused(member: Member, tmp_path: Path) -> None:
    _, folder = saved(member, stack(), tmp_path)
    other = stack()
    torch.manual_seed(9)
    nn.init.normal_(other[2].weight, 0, 0.2)
    is_refused(folder, other, "2: the adapter was trained on another weight", "Load the base model")


@each_variant
def test_a_relative_of_the_base_is_refused(member: Member, tmp_path: Path) -> None:
    """A little more training of the base: near enough for a full checkpoint, not for a compact one."""
    _, folder = saved(member, stack(), tmp_path)
    other = stack()
    with torch.no_grad():
        other[2].weight.add_(1e-3 * torch.randn(20, 12, generator=torch.Generator().manual_seed(5)))
    is_refused(folder, other, "2: the adapter's file holds no frames", "save_frames=True")


@each_member
@pytest.mark.parametrize("first", ["made", "used"])
@pytest.mark.parametrize("kind", ["nf4", "nf4 single"])
def test_a_four_bit_base_may_have_been_evaluated_before(
    member: Member, first: str, kind: str, tiny: str, tmp_path: Path
) -> None:
    """On some CPUs bitsandbytes rounds the scales of a 4-bit weight then, for good: the frames are the same still."""
    made, used = load(tiny, kind), load(tiny, kind)
    logits(made if first == "made" else used)
    model, folder = saved(member, made, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        again = PeftModel.from_pretrained(used, folder)
    assert same_slots(model, again)
    expected = logits(model)
    assert (logits(again) - expected).norm() <= 0.05 * expected.norm()  # the base itself is a little another


# Frames that come out otherwise -----------------------------------------------------------------------------------


@each_decomposed
def test_flipped_signs_are_put_right(member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = saved(member, stack(), tmp_path)
    altered(monkeypatch, flipped)
    again = PeftModel.from_pretrained(stack(), folder)
    assert torch.equal(output(again), output(model))
    assert same_slots(model, again)
    monkeypatch.setattr(anchors, "aligned", lambda frames, saved: frames)  # without which they would be wrong:
    wrong = PeftModel.from_pretrained(stack(), folder)
    assert not same_slots(model, wrong)
    assert (str(member) in SIGNLESS) == torch.allclose(output(wrong), output(model), atol=1e-4)


@each_member
@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_flipped_signs_are_put_right_on_every_storage(
    member: Member, kind: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved(member, load(tiny, kind), tmp_path, target_modules=["q_proj"])
    altered(monkeypatch, flipped)
    assert torch.equal(logits(PeftModel.from_pretrained(load(tiny, kind), folder)), logits(model))


@each_decomposed
@pytest.mark.parametrize("low", [False, True])
def test_vectors_that_have_turned_are_refused_by_name(
    member: Member, low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved(member, stack(), tmp_path)
    altered(monkeypatch, rotated(0.01))
    said = (r"[024]: \w*(left|right)0?, computed again", r"in vector \d+ \(by \d\.\de-0", "save_frames=True")
    is_refused(folder, stack(), *said, low=low)


@each_decomposed
def test_vectors_that_have_turned_a_little_will_do(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved(member, stack(), tmp_path)
    altered(monkeypatch, rotated(1e-5))
    again = PeftModel.from_pretrained(stack(), folder)
    assert (output(again) - output(model)).norm() <= 1e-4 * output(model).norm()


@pytest.mark.parametrize("angle", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("slot", ["left", "cut_right"])
def test_a_turn_is_found_whatever_the_pair(angle: float, slot: str) -> None:
    """An anchor is two random products: of any pair of vectors, whatever their norms."""
    generator, missed = torch.Generator().manual_seed(0), 0
    turn = torch.tensor([[1.0, -angle], [angle, 1.0]]) / (1 + angle**2) ** 0.5
    norms = 10.0 ** -torch.arange(6)
    for size in range(20, 60):
        q = torch.linalg.qr(torch.randn(size, 6, generator=generator))[0]
        for first in range(5):
            other = q.clone()
            other[:, first : first + 2] = q[:, first : first + 2] @ turn
            known, found = ((part * norms) if slot == "left" else (part * norms).T for part in (q, other))
            kept = anchors.anchors({slot: known}, ())
            said = refusal(lambda found=found, kept=kept: anchors.aligned({slot: found}, kept))
            missed += not said
            assert not said or said.startswith(f"{slot}, computed again")
            assert not said or any(f"in vector {index} " in said for index in (first, first + 1))
    assert missed <= 1  # of 200


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_anchors_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[next(key for key in tensors if ".anchor_" in key)][1, 2] = bad

    for member in (FREE[0], FREE[5], FREE[7]):
        _, folder = saved(member, stack(), tmp_path / member.name)
        change(folder, spoil)
        is_refused(
            folder, stack(), r"[024]: anchor_\w+ in the adapter's file has NaN or infinite entries", "Use another"
        )
    frames = {"left": torch.eye(5)[:, :3]}
    kept = anchors.anchors(frames, ())
    kept["anchor_left"][1, 2] = bad
    with pytest.raises(ValueError, match=r"left, computed again .* in vector 2"):
        anchors.aligned(frames, kept)


def test_a_missing_anchor_is_refused(tmp_path: Path) -> None:
    for member in (FREE[0], FREE[5], FREE[7]):
        _, folder = saved(member, stack(), tmp_path / member.name)
        change(folder, lambda tensors: tensors.__delitem__(next(key for key in tensors if ".anchor_" in key)))
        is_refused(folder, stack(), "lacks anchor_", "save it again")


def test_frames_that_are_not_finite_are_refused() -> None:
    frames = {"right": torch.eye(5)[:3]}
    kept = anchors.anchors(frames, ())
    frames["right"][2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"right, computed again .* in vector 2"):
        anchors.aligned(frames, kept)


# Weights that leave a choice --------------------------------------------------------------------------------------


def _rotation(seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(seed)))[0]


CHOICES = {
    "identity": torch.eye(24),
    "rotation": 3 * _rotation(2),
    "pairs": _rotation(3) * (torch.arange(24) // 2 + 1) @ _rotation(4),
    "low rank": torch.randn(24, 3, generator=torch.Generator().manual_seed(1)) @ torch.eye(24)[:3],
    "zero": torch.zeros(24, 24),
}


@each_variant
@pytest.mark.parametrize("weight", CHOICES.values(), ids=CHOICES)
def test_repeated_singular_values_come_out_the_same_again(member: Member, weight: Tensor, tmp_path: Path) -> None:
    def base() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(24, 24))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        return model

    torch.manual_seed(0)
    model, folder = saved(member, base(), tmp_path, target_modules=["0"])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(base(), folder)
    assert same_slots(model, again)
    assert torch.equal(output(again), output(model))
    assert torch.isfinite(output(model)).all()


def test_a_choice_that_falls_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orthogonal weight's vectors may be any: if they come out otherwise, what was learnt is not put on them."""
    base = nn.Sequential(nn.Linear(24, 24))
    nn.init.orthogonal_(base[0].weight)
    lora_xs = next(member for member in FREE if member.name == "lora_xs")
    _, folder = saved(lora_xs, base, tmp_path, target_modules=["0"])
    altered(monkeypatch, rotated(0.7))
    twin = nn.Sequential(nn.Linear(24, 24))
    twin.load_state_dict({"weight": base[0].base_layer.weight, "bias": base[0].base_layer.bias}, strict=False)
    with torch.no_grad():
        twin[0].weight.copy_(base[0].base_layer.weight)
    is_refused(folder, twin, "0: left, computed again from the base weight, differs")
