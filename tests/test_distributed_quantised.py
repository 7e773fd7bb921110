"""4- and 8-bit bases in two processes (gloo): DDP, FSDP2, ZeRO-3 train as one process does, and save what they have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from distributed_worker import build, plain, train
from launch import torchrun
from members import Member
from peft import PeftModel
from quantised_worker import QUANTISED, RUNS

from peft_kasa import to_lora

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("quantised_processes")]
each_member = pytest.mark.parametrize("member", QUANTISED, ids=str)
each_run = pytest.mark.parametrize("run", RUNS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """A folder with what was trained, by run and member."""
    folder = tmp_path_factory.mktemp("quantised")
    torchrun("quantised_worker.py", tiny, str(folder), *RUNS, DS_ACCELERATOR="cpu")
    return folder


@pytest.fixture(scope="module")
def alone(tiny: str) -> Callable[[str, Member], torch.Tensor]:
    """The losses of one process, over the same rows, by how the base is stored."""
    kinds = {run.split("-")[1] for run in RUNS}
    losses = {(kind, m.name): train(build(m, bases.load(tiny, kind)), plain) for kind in kinds for m in QUANTISED}
    return lambda kind, member: losses[kind, member.name]


def noted(folder: Path, run: str, member: Member) -> Any:
    """What the first process noted."""
    return torch.load(folder / run / member.name / "found.pt")


@each_run
@each_member
def test_losses_are_those_of_one_process(member: Member, run: str, folder: Path, alone: Any) -> None:
    found = noted(folder, run, member)["losses"]
    assert (found - alone(run.split("-")[1], member)).abs().max() < 1e-5


@each_run
@each_member
def test_what_is_saved_gives_the_same_logits_and_lora(member: Member, run: str, folder: Path, tiny: str) -> None:
    found = noted(folder, run, member)
    model = PeftModel.from_pretrained(bases.load(tiny, run.split("-")[1]), folder / run / member.name / "all")
    expected = to_lora(model)[1]
    assert expected.keys() == found["lora"].keys()
    assert all(torch.equal(value, found["lora"][key]) for key, value in expected.items())
    assert all(torch.equal(bases.logits(model), logits) for logits in found["logits"])


@each_member
@pytest.mark.parametrize("run", ["fsdp-nf4", "zero3-nf4"])
def test_in_parts_merging_and_loading_are_refused_by_name(member: Member, run: str, folder: Path) -> None:
    merging, loading = noted(folder, run, member)["refused"]
    assert merging.startswith("model.layers.0.self_attn.q_proj: the base weight is in parts")
    assert loading.startswith("model.layers.0.self_attn.q_proj: adapter 'default' is sharded")


def test_eight_bits_under_fsdp_are_refused_by_name(folder: Path) -> None:
    said = (folder / "refused").read_text()
    assert said.startswith("model.layers.0.self_attn.q_proj: an 8-bit weight cannot be in parts under FSDP2")
