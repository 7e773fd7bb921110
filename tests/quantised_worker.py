"""One of the two processes of tests/test_distributed_quantised.py: trains members on a 4- or 8-bit base.

torchrun --nproc-per-node 2 tests/quantised_worker.py BASE FOLDER ddp-nf4 fsdp-nf4
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bases
import torch
import torch.distributed as dist
from distributed_worker import TRIED, WAYS, build, refusals, save, train
from members import Member

from peft_kasa import to_lora

QUANTISED = [member for member in TRIED if member.name in ("kasa", "svf")]
RUNS = ("ddp-nf4", "ddp-int8", "fsdp-nf4", "zero3-nf4", "zero3-int8")


def run(base: str, way: str, kind: str, member: Member, folder: Path) -> dict[str, Any]:
    """What the first process is to note of one member: evaluated twice, since that may repack a base."""
    model = build(member, bases.load(base, kind))
    losses = train(model, WAYS[way], dist.get_rank(), dist.get_world_size())
    dist.all_reduce(losses)
    save(model, way, folder)
    dist.barrier()
    logits = [bases.logits(model) for _ in range(2)]
    lora = to_lora(model)[1]
    refused = refusals(model, folder) if way in ("fsdp", "zero3") else []
    return {"losses": losses / dist.get_world_size(), "logits": logits, "lora": lora, "refused": refused}


def refusal(base: str) -> str:
    """What a first pass says of an 8-bit base under FSDP2."""
    step = WAYS["fsdp"](build(QUANTISED[0], bases.load(base, "int8")))
    try:
        step(bases.tokens())
    except ValueError as error:
        return str(error)
    return ""


def main(base: str, folder: Path, runs: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in runs:
        way, kind = name.split("-")
        for member in QUANTISED:
            found = run(base, way, kind, member, folder / name / member.name)
            if dist.get_rank() == 0:
                torch.save(found, folder / name / member.name / "found.pt")
    refused = refusal(base)
    if dist.get_rank() == 0:
        (folder / "refused").write_text(refused)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
