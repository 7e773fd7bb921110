"""One of the two processes of tests/test_distributed.py: trains members in the given ways, saves, notes what it saw.

torchrun --nproc-per-node 2 tests/distributed_worker.py FOLDER ddp fsdp
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bases
import torch
import torch.distributed as dist
from members import MEMBERS, Member
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from peft_kasa import to_lora
from peft_kasa.adapter.base.sharding import whole
from peft_kasa.training.callback import keep_frozen

STEPS, ROWS = 10, 4
AT_FIRST = ["default", "__base__"] * 2  # an adapter a row: of two processes, one has no row of any adapter,
BY_ROW = ["default", "halved", "__base__", "halved"]  # or none of the trained one
STRONG: dict[str, dict[str, Any]] = {"kasa": {"beta": 1.0, "gamma": 1.0, "form": "paper"}, "sorsa": {"gamma": 1.0}}
TRIED = [m for m in MEMBERS if m.name in ("kasa", "sorsa", "pissa", "svf", "svft", "lora_xs")]

IN_PARTS = ["fsdp", "zero3"]

Step = Callable[[Tensor], float]  # this process's rows to its loss


def build(member: Member, base: nn.Module | None = None) -> PeftModel:
    """The member on the tiny model, with a strong regulariser where it has one."""
    return get_peft_model(base or bases.fresh(), member.config(**STRONG.get(member.name, {})))


def deepspeed_without_compiling() -> Any:
    """DeepSpeed, without an operator that it would compile first, for minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def divided() -> nn.Module:
    """The tiny model as ZeRO-3 loads one: in parts from the beginning."""
    deepspeed = deepspeed_without_compiling()
    base = bases.fresh()
    deepspeed.zero.Init(module=base, config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}})
    return base


def adam(model: nn.Module) -> torch.optim.AdamW:
    """A large eps: where a gradient is zero but for rounding, Adam would step by its sign."""
    return torch.optim.AdamW(bases.learning(model), lr=5e-3, eps=1e-4)


def plain(model: nn.Module) -> Step:
    """A loop of torch alone."""
    optimizer = adam(model)

    def step(ids: Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def ddp(model: PeftModel) -> Step:
    return plain(nn.parallel.DistributedDataParallel(model))


def fsdp(model: PeftModel) -> Step:
    """FSDP2: a block at a time, then the rest."""
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return plain(fully_shard(model))


def zero(stage: int, model: PeftModel, accumulate: int = 2) -> Step:
    """DeepSpeed, a row at a time; everything is in parts, however small."""
    deepspeed = deepspeed_without_compiling()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # its default is 1
    }
    engine = deepspeed.initialize(model=model, optimizer=adam(model), config=config)[0]

    def step(ids: Tensor) -> float:
        total = 0.0
        for row in ids.chunk(accumulate):
            loss = engine(input_ids=row, labels=row).loss
            engine.backward(loss)
            engine.step()
            total += loss.item() / accumulate
        return total

    return step


WAYS: dict[str, Callable[[PeftModel], Step]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "zero2": partial(zero, 2),
    "zero3": partial(zero, 3),
}


def train(model: PeftModel, way: Callable[[Any], Step], rank: int = 0, ranks: int = 1) -> Tensor:
    """This process's losses, (STEPS,)."""
    step = way(model.train())
    return torch.tensor([step(bases.tokens(ROWS, seed=seed)[rank::ranks]) for seed in range(STEPS)])


def save(model: PeftModel, way: str, folder: Path) -> None:
    """By all processes together; where it is in parts also by the first alone, of what all have gathered."""
    first = dist.get_rank() == 0
    model.save_pretrained(folder / "all", is_main_process=first)
    state = gathered(model, way, first)
    if state and first:
        model.save_pretrained(folder / "first", state_dict=state)


def gathered(model: PeftModel, way: str, first: bool) -> dict[str, Any]:
    """What torch gathers of FSDP2, and what DeepSpeed gathers for Trainer's saves: only what learns."""
    if way == "fsdp":
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if way == "zero3":
        keep_frozen(model, first)
        return {name: whole(value).detach() for name, value in model.named_parameters() if value.requires_grad}
    return {}


def refusals(model: PeftModel, folder: Path) -> list[str]:
    """What merging says, and loading a file."""
    said = []
    for attempt in (model.merge_adapter, lambda: model.load_adapter(folder / "all", "default")):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


@torch.no_grad()
def by_row(model: PeftModel, names: list[str], rank: int = 0, ranks: int = 1) -> Tensor:
    """Logits of this process's rows, each with the adapter of its name: "halved" has half the trained one's update."""
    if "halved" in names:
        model.add_weighted_adapter(["default"], [0.5], "halved", combination_type="cat")
    return model.eval()(input_ids=bases.tokens(ROWS)[rank::ranks], adapter_names=names[rank::ranks]).logits


def of_all(mine: Tensor) -> Tensor:
    """The rows of all processes, in their order."""
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine.contiguous())
    return torch.stack(every, dim=1).flatten(0, 1)


def run(way: str, member: Member, folder: Path) -> dict[str, Any]:
    """What the first process is to note of one member."""
    mine, noted = (dist.get_rank(), dist.get_world_size()), {}

    def started(model: PeftModel) -> Step:
        step = WAYS[way](model)
        if way in IN_PARTS:
            noted["at_first"] = of_all(by_row(model, AT_FIRST, *mine))
        model.train()
        return step

    model = build(member, divided() if way == "zero3" else None)
    losses = train(model, started, *mine)
    dist.all_reduce(losses)
    save(model, way, folder)
    dist.barrier()
    with torch.no_grad():
        logits = model.eval()(input_ids=bases.tokens()).logits
    lora = to_lora(model)[1]
    if way in IN_PARTS:
        noted |= {"refused": refusals(model, folder), "by_row": of_all(by_row(model, BY_ROW, *mine))}
    return noted | {"losses": losses / mine[1], "logits": logits, "lora": lora}


def main(folder: Path, ways: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for way in ways:
        for member in TRIED:
            found = run(way, member, folder / way / member.name)
            if dist.get_rank() == 0:
                torch.save(found, folder / way / member.name / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
