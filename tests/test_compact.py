"""Checkpoints without frames: small, exact where the base gives the frames again, and refused by name where not."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import bases
import pytest
import torch
from bases import load, logits, stack
from compacting import (
    FRAMES,
    LARGE,
    OTHERS,
    each_member,
    each_storage,
    each_variant,
    frames,
    held,
    large,
    layers_of,
    output,
    same_slots,
    saved,
    slots_in,
)
from members import MEMBERS, Member
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn

from peft_kasa import LoRAXSConfig, SVFConfig, SVFTConfig
from peft_kasa.adapter.files import anchors

# What a file holds ------------------------------------------------------------------------------------------------


def check_file(member: Member, make: Callable[[], nn.Module], folder: Path) -> None:
    model, compact = saved(member, make(), folder / "compact")
    slots = layers_of(model)[0].slots("default")
    frozen = ((FRAMES | {"left", "core", "right"}) - set(member.learns)) & slots.keys()
    vectors = {f"anchor_{name}" for name in frozen & {*anchors.DOWN, *anchors.ACROSS}}
    expected = {*member.learns, "fingerprint", *vectors, *({"fixed"} & slots.keys())}
    tensors = held(compact)
    for layer in layers_of(model):
        assert {key.rpartition(".")[2] for key in tensors if f".{layer.name}." in key} == expected
    assert len(tensors) == len(expected) * len(layers_of(model))
    _, path = saved(member, make(), folder / "full", save_frames=True)
    full = held(path)
    assert slots_in(path) == slots.keys() - vectors
    sizes = [sum(value.numel() for value in file.values()) for file in (tensors, full)]
    assert sizes[0] < sizes[1] if frozen else sizes[0] == sizes[1]
    for key in (key for key in tensors if ".anchor_" not in key):
        rounding = 1e-2 if key.endswith(".fixed") else 0  # a 4-bit weight is taken as repacked
        assert torch.allclose(tensors[key], full[key], rounding, 0)


@each_member
@each_storage
def test_a_file_holds_what_learns_and_what_tells_the_frames(
    member: Member, kind: str, tiny: str, tmp_path: Path
) -> None:
    check_file(member, lambda: load(tiny, kind), tmp_path)


@pytest.mark.parametrize("member", OTHERS, ids=str)
def test_a_file_of_a_variant_does_too(member: Member, tmp_path: Path) -> None:
    check_file(member, stack, tmp_path)


def test_files_are_of_the_size_that_is_counted(tmp_path: Path) -> None:
    """LoRA-XS at r = 16 on 512 x 512: 256 numbers for the core, 4 r to tell its frames and 64 to tell the base."""
    sizes = []
    for save_frames in (False, True):
        config = LoRAXSConfig(r=16, save_frames=save_frames, target_modules=["0"])
        get_peft_model(nn.Sequential(nn.Linear(512, 512)), config).save_pretrained(str(tmp_path / str(save_frames)))
        sizes.append(sum(value.numel() for value in held(str(tmp_path / str(save_frames))).values()))
    assert sizes == [16 * 16 + 2 * 2 * 16 + 64, 16 * 16 + 2 * 512 * 16 + 64]


@pytest.mark.parametrize("member", [member for member in MEMBERS if member.config_class.needs], ids=str)
def test_what_came_from_data_is_not_left_out(member: Member) -> None:
    with pytest.raises(ValueError, match=r"save_frames has to be True: what comes from data cannot be computed again"):
        member.config(save_frames=False)
    assert member.config().keeps_frames


@each_member
def test_svf_and_svft_are_compact_unless_told(member: Member, tmp_path: Path) -> None:
    default = member.config_class in (SVFConfig, SVFTConfig)
    assert member.config().keeps_frames is not default
    _, folder = saved(member, stack(), tmp_path, save_frames=None)
    assert any(slot.startswith("anchor_") for slot in slots_in(folder)) == default


# Loading ----------------------------------------------------------------------------------------------------------


@each_member
@each_storage
def test_reload_is_exact(member: Member, kind: str, tiny: str, tmp_path: Path) -> None:
    model, path = saved(member, load(tiny, kind), tmp_path, rank_pattern={"q_proj": 6})
    expected = logits(model)
    assert not torch.equal(expected, logits(load(tiny, kind)))
    for low in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=FutureWarning)
            again = PeftModel.from_pretrained(load(tiny, kind), path, low_cpu_mem_usage=low)
        assert torch.equal(logits(again), expected)
        assert same_slots(model, again)
        assert not any(layer.adapters["default"].awaiting for layer in layers_of(again))


@pytest.mark.parametrize("member", OTHERS, ids=str)
def test_reload_of_a_variant_is_exact(member: Member, tmp_path: Path) -> None:
    model, path = saved(member, stack(), tmp_path)
    expected = output(model)
    for low in (False, True):
        again = PeftModel.from_pretrained(stack(), path, low_cpu_mem_usage=low)
        assert torch.equal(output(again), expected)
        assert same_slots(model, again)


@each_member
def test_auto_classes_read_it(member: Member, tiny: str, tmp_path: Path) -> None:
    model, folder = saved(member, load(tiny), tmp_path, task_type="CAUSAL_LM")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), logits(model))


@each_variant
def test_a_reloaded_adapter_trains_on_with_its_optimizer(member: Member, tmp_path: Path) -> None:
    """Saved after two steps, with the optimizer's state, and loaded: the third step is that of an unbroken run."""
    model, folder = saved(member, stack(), tmp_path / "start")
    again = PeftModel.from_pretrained(stack(), folder, is_trainable=True)
    optimizers = [torch.optim.AdamW(bases.learning(each), lr=1e-2) for each in (model, again)]
    for _ in range(2):
        assert _step(model, optimizers[0]) == _step(again, optimizers[1])
    again.save_pretrained(str(tmp_path / "two"))
    third = PeftModel.from_pretrained(stack(), str(tmp_path / "two"), is_trainable=True)
    optimizer = torch.optim.AdamW(bases.learning(third), lr=1e-2)
    optimizer.load_state_dict(optimizers[1].state_dict())
    losses = [(_step(model, optimizers[0]), _step(third, optimizer)) for _ in range(2)]
    assert all(unbroken == resumed for unbroken, resumed in losses)
    assert torch.equal(output(third), output(model))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(7))
    loss = model.train()(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


FRESH = """
import sys, torch
import compacting
from peft import PeftModel
folder, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
found = {}
for member in compacting.LARGE:
    model = PeftModel.from_pretrained(compacting.large(), f"{folder}/{member}")
    found[str(member)] = compacting.frames(model)
torch.save(found, out)
"""


def test_a_fresh_process_with_another_number_of_threads_gives_the_same_bits(tmp_path: Path) -> None:
    expected = {}
    for member in LARGE:
        model, _ = saved(member, large(), tmp_path / str(member), target_modules=["0"], r=24)
        expected[str(member)] = frames(model)
    other = 2 if torch.get_num_threads() == 1 else 1
    environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.abspath(__file__)), "OMP_NUM_THREADS": str(other)}
    command = [sys.executable, "-c", FRESH, str(tmp_path), str(tmp_path / "out.pt"), str(other)]
    subprocess.run(command, check=True, env=environment)
    assert torch.load(tmp_path / "out.pt", weights_only=False) == expected
