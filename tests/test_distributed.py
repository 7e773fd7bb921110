"""Two processes (gloo) train as one does, and what they save is what they have: DDP, FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from distributed_worker import AT_FIRST, BY_ROW, ROWS, TRIED, build, by_row, plain, train
from launch import torchrun
from members import Member
from peft import PeftModel
from safetensors.torch import load_file

from peft_kasa import to_lora

WAYS = ["ddp", "fsdp"]

each_member = pytest.mark.parametrize("member", TRIED, ids=str)
each_way = pytest.mark.parametrize("way", WAYS)

Found = Callable[[str, Member], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The folder of a member that was trained in some way, and what the first process noted."""
    folder = tmp_path_factory.mktemp("distributed")
    torchrun("distributed_worker.py", str(folder), *WAYS)
    return lambda way, member: (folder / way / member.name, torch.load(folder / way / member.name / "found.pt"))


@pytest.fixture(scope="module")
def alone() -> Callable[[Member], torch.Tensor]:
    """The losses of one process, over the same rows."""
    losses = {member.name: train(build(member), plain) for member in TRIED}
    return lambda member: losses[member.name]


@each_way
@each_member
def test_losses_are_those_of_one_process(member: Member, way: str, found: Found, alone: Any) -> None:
    """Over ten steps, regularisers at full strength: one that is dropped, halved or doubled shows."""
    assert (found(way, member)[1]["losses"] - alone(member)).abs().max() < 1e-5


@pytest.mark.parametrize("member", [member for member in TRIED if member.regularized], ids=str)
def test_a_regulariser_half_as_strong_would_show(member: Member, alone: Any) -> None:
    half = build(member)
    for name in ("beta", "gamma"):
        if hasattr(config := half.peft_config["default"], name):
            setattr(config, name, getattr(config, name) / 2)
    assert (train(half, plain) - alone(member)).abs().max() > 1e-4


@each_way
@each_member
def test_what_is_saved_gives_the_same_logits(member: Member, way: str, found: Found) -> None:
    folder, noted = found(way, member)
    loaded = PeftModel.from_pretrained(bases.fresh(), folder / "all")
    assert torch.equal(bases.logits(loaded), noted["logits"])
    assert not torch.equal(noted["logits"], bases.logits(build(member)))


@each_member
def test_all_together_save_what_the_first_saves_of_a_gathered_state(member: Member, found: Found) -> None:
    folder, _ = found("fsdp", member)
    together, alone = (load_file(folder / way / "adapter_model.safetensors") for way in ("all", "first"))
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[key], alone[key]) for key in alone)


@each_way
@each_member
def test_exports_what_was_trained(member: Member, way: str, found: Found) -> None:
    folder, noted = found(way, member)
    expected = to_lora(PeftModel.from_pretrained(bases.fresh(), folder / "all"))[1]
    assert expected.keys() == noted["lora"].keys()
    for key, value in expected.items():
        assert torch.equal(value, noted["lora"][key])


@each_member
def test_in_parts_merging_and_loading_are_refused_by_name(member: Member, found: Found) -> None:
    merging, loading = found("fsdp", member)[1]["refused"]
    assert merging.startswith("model.layers.0.self_attn.q_proj: the base weight is in parts")
    assert loading.startswith("model.layers.0.self_attn.q_proj: adapter 'default' is sharded")


@each_member
def test_in_parts_sums_and_mixed_batches_are_those_of_one_process(member: Member, found: Found) -> None:
    folder, noted = found("fsdp", member)
    assert (noted["at_first"] - by_row(build(member), AT_FIRST)).abs().max() < 1e-5
    expected = by_row(PeftModel.from_pretrained(bases.fresh(), folder / "all"), BY_ROW)
    assert (noted["by_row"] - expected).abs().max() < 1e-5
    moved = (expected - bases.logits(bases.fresh(), bases.tokens(ROWS))).abs().amax(dim=(1, 2))
    assert moved[2] == 0 < 1e-3 < moved[[0, 1, 3]].min()
