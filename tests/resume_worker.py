"""One of the two processes of tests/test_resume.py: trains, and trains again from the checkpoint of the middle.

torchrun --nproc-per-node 2 tests/resume_worker.py BASE FOLDER ddp zero2 zero3 fsdp
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bases
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_worker import TRIED, adam, build, deepspeed_without_compiling
from members import Member
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

RESUMED = [member for member in TRIED if member.name == "kasa"]
STEPS, SAVED = 6, 3
ROWS = [{"input_ids": row, "labels": row} for row in bases.tokens(4 * STEPS)]


def zero(stage: int) -> dict[str, Any]:
    """A config for transformers; everything is in parts, however small."""
    deepspeed_without_compiling()
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": "auto",
    }


def trainer(base: str, member: Member, way: str, folder: Path) -> Trainer:
    """A new Trainer with a new model and adapter, as after a restart."""
    unset_hf_deepspeed_config()
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=SAVED,
        logging_steps=1,
        learning_rate=5e-3,
        per_device_train_batch_size=2,
        deepspeed=zero(int(way[-1])) if way.startswith("zero") else None,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(build(member, LlamaForCausalLM.from_pretrained(base)), arguments, train_dataset=ROWS)


def by_trainer(base: str, member: Member, way: str, folder: Path) -> list[list[float]]:
    """The losses from the middle on: of a run that went on, and of one that resumed."""
    found = []
    for checkpoint in (None, str(folder / f"checkpoint-{SAVED}")):
        made = trainer(base, member, way, folder)
        made.train(resume_from_checkpoint=checkpoint)
        found.append([entry["loss"] for entry in made.state.log_history if "loss" in entry][SAVED:])
    return found


def sharded(member: Member) -> tuple[nn.Module, torch.optim.Optimizer]:
    """FSDP2: a block at a time, then the rest."""
    model = build(member).train()
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return model, adam(fully_shard(model))


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> list[float]:
    """The losses of these steps."""
    losses = []
    for step in range(begin, end):
        ids = bases.tokens(4, seed=step)[dist.get_rank() :: 2]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def by_loop(base: str, member: Member, way: str, folder: Path) -> list[list[float]]:
    """The same with torch's own distributed checkpoint, of what learns alone."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    model, optimizer = sharded(member)
    fit(model, optimizer, 0, SAVED)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    dcp.save(state, checkpoint_id=folder)
    went_on = fit(model, optimizer, SAVED, STEPS)
    model, optimizer = sharded(member)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    return [went_on, fit(model, optimizer, SAVED, STEPS)]


def main(base: str, folder: Path, ways: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for way in ways:
        for member in RESUMED:
            place = folder / way / member.name
            found = (by_loop if way == "fsdp" else by_trainer)(base, member, way, place)
            if dist.get_rank() == 0:
                torch.save(found, place / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
