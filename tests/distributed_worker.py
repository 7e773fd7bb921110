"""One of the processes of tests/test_distributed.py: trains each member in one way, saves it, and notes what it saw."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import torch
import torch.distributed as dist
from members import MEMBERS, Member
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from peft_kasa import to_lora

STEPS, ROWS = 10, 4
STRONG: dict[str, dict[str, Any]] = {
    "kasa": {"beta": 1.0, "gamma": 1.0, "form": "paper"},
    "sorsa": {"gamma": 1.0},
}


def build(member: Member, **given: Any) -> PeftModel:
    """The member on the tiny model, with a strong regulariser where it has one."""
    return get_peft_model(bases.fresh(), member.config(**STRONG.get(member.name, {}), **given))


def batch(step: int, rank: int = 0, ranks: int = 1) -> torch.Tensor:
    """This process's rows of the step's batch."""
    return bases.tokens(ROWS, seed=step)[rank::ranks]


def train(model: nn.Module, rank: int = 0, ranks: int = 1) -> list[float]:
    """This process's losses."""
    optimizer = torch.optim.AdamW(bases.learning(model), lr=1e-3, eps=1e-4)
    model.train()
    losses = []
    for step in range(STEPS):
        ids = batch(step, rank, ranks)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sharded(model: PeftModel) -> nn.Module:
    """FSDP2: a block at a time, then the rest."""
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)


WAYS: dict[str, Callable[[PeftModel], nn.Module]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp": sharded,
}


def save(model: PeftModel, folder: Path) -> None:
    """By all processes; and by the first alone, of what all have gathered."""
    first = dist.get_rank() == 0
    model.save_pretrained(folder / "all", is_main_process=first)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if first:
        model.save_pretrained(folder / "first", state_dict=state)


def refusal(model: PeftModel) -> str:
    """What merging says."""
    try:
        model.merge_adapter()
    except ValueError as error:
        return str(error)
    model.unmerge_adapter()
    return ""


def run(way: str, member: Member, folder: Path) -> dict[str, Any]:
    model = build(member)
    local = torch.tensor(train(WAYS[way](model), dist.get_rank(), dist.get_world_size()))
    dist.all_reduce(local, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
    save(model, folder)
    return {
        "losses": local / dist.get_world_size(),
        "logits": bases.logits(model),
        "lora": to_lora(model)[1],
        "merge": refusal(model),
    }


def main(way: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for member in MEMBERS:
        found = run(way, member, folder / str(member))
        if dist.get_rank() == 0:
            torch.save(found, folder / str(member) / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
