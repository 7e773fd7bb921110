"""Two processes (gloo) go on from a checkpoint as if they had never stopped: Trainer with DDP or DeepSpeed, FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import torchrun
from members import Member
from resume_worker import RESUMED, SAVED, STEPS

WAYS = ["ddp", "zero2", "zero3", "fsdp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """A folder with the losses, by way and member."""
    folder = tmp_path_factory.mktemp("resumed")
    torchrun("resume_worker.py", tiny, str(folder), *WAYS, DS_ACCELERATOR="cpu")
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("member", RESUMED, ids=str)
def test_losses_go_on_as_without_a_stop(member: Member, way: str, folder: Path) -> None:
    went_on, resumed = torch.tensor(torch.load(folder / way / member.name / "found.pt"))
    assert len(went_on) == STEPS - SAVED
    assert (resumed - went_on).abs().max() < 1e-5
