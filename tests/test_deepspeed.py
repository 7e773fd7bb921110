"""DeepSpeed ZeRO-2 and -3 in two processes, with gradient accumulation, train as one process does.

Under ZeRO-3 the base is in parts before there is an adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from distributed_worker import AT_FIRST, BY_ROW, TRIED, build, by_row, plain, train
from launch import torchrun
from members import Member
from peft import PeftModel
from safetensors.torch import load_file

from peft_kasa import to_lora

WAYS = ["zero2", "zero3"]

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("deepspeed")]
each_member = pytest.mark.parametrize("member", TRIED, ids=str)
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what was trained, by way and member."""
    folder = tmp_path_factory.mktemp("deepspeed")
    torchrun("distributed_worker.py", str(folder), *WAYS, DS_ACCELERATOR="cpu")
    return folder


def noted(folder: Path, way: str, member: Member) -> Any:
    """What the first process noted."""
    return torch.load(folder / way / member.name / "found.pt")


def loaded(folder: Path, way: str, member: Member) -> PeftModel:
    """The saved adapter on a fresh base."""
    return PeftModel.from_pretrained(bases.fresh(), folder / way / member.name / "all")


@each_member
def test_losses_are_those_of_one_process(member: Member, folder: Path) -> None:
    alone = train(build(member), plain)
    for way in WAYS:
        assert (noted(folder, way, member)["losses"] - alone).abs().max() < 1e-5


@each_way
@each_member
def test_what_is_saved_gives_the_same_logits_and_lora(member: Member, way: str, folder: Path) -> None:
    model, found = loaded(folder, way, member), noted(folder, way, member)
    assert torch.equal(bases.logits(model), found["logits"])
    expected = to_lora(model)[1]
    assert expected.keys() == found["lora"].keys()
    assert all(torch.equal(value, found["lora"][key]) for key, value in expected.items())


@each_member
def test_the_first_process_saves_the_same_of_what_learns(member: Member, folder: Path) -> None:
    """As Trainer does; frozen slots it has copies of."""
    saved = folder / "zero3" / member.name
    together, alone = (load_file(saved / way / "adapter_model.safetensors") for way in ("all", "first"))
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[key], alone[key]) for key in alone)


@each_member
def test_in_parts_merging_and_loading_are_refused_by_name(member: Member, folder: Path) -> None:
    merging, loading = noted(folder, "zero3", member)["refused"]
    assert merging.startswith("model.layers.0.self_attn.q_proj: the base weight is in parts")
    assert loading.startswith("model.layers.0.self_attn.q_proj: adapter 'default' is sharded")


@each_member
def test_in_parts_sums_and_mixed_batches_are_those_of_one_process(member: Member, folder: Path) -> None:
    """Whatever rows a process has: gathering is in common, and a process that did not take part would be waited for."""
    found = noted(folder, "zero3", member)
    assert (found["at_first"] - by_row(build(member), AT_FIRST)).abs().max() < 1e-5
    assert (found["by_row"] - by_row(loaded(folder, "zero3", member), BY_ROW)).abs().max() < 1e-5
