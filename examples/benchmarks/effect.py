"""How much of a regulariser's gradient reaches the parameters: effective / intended, for one optimiser step.

The same step is taken twice from the same state, with the regulariser on and off, by plain SGD at lr = 1. What the
parameters differ by is the effective gradient; the intended one is autograd's of `penalty(model)` at that state.
"""

from __future__ import annotations

import copy
import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PrinterCallback

from peft_kasa import penalty
from peft_kasa.adapter.base.sharding import whole

Step = Callable[[nn.Module], None]


def learning(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def switch(model: Any, on: bool) -> None:
    """Switches the regulariser of the model's adapters."""
    for config in model.peft_config.values():
        config.regularize = on


def effect(model: Any, step: Step) -> tuple[float, float]:
    """(effective / intended, relative size of what is off that direction) of one step."""
    switch(model, True)
    gradients = torch.autograd.grad(penalty(model), learning(model), materialize_grads=True)
    intended = torch.cat([gradient.flatten() for gradient in gradients])
    after = []
    for on in (True, False):
        twin = copy.deepcopy(model)
        switch(twin, on)
        step(twin)
        after.append(torch.cat([whole(value).detach().flatten() for value in learning(twin)]))
    effective = after[1] - after[0]
    ratio = (effective @ intended / (intended @ intended)).item()
    return ratio, ((effective - ratio * intended).norm() / intended.norm()).item()


def sgd(model: nn.Module, **given: Any) -> torch.optim.SGD:
    """Plain SGD at lr = 1."""
    return torch.optim.SGD(learning(model), lr=1.0, **given)


def device(model: nn.Module) -> torch.device:
    """Where the model is."""
    return next(model.parameters()).device


def backward(model: nn.Module, batches: list[torch.Tensor], scale: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """One backward pass a batch, of the batches' mean loss."""
    for ids in (batch.to(device(model)) for batch in batches):
        scale(model(input_ids=ids, labels=ids).loss / len(batches)).backward()


def loop(batches: list[torch.Tensor], autocast: torch.dtype | None = None) -> Step:
    """A training loop written by hand, with gradient accumulation over the batches."""

    def step(model: nn.Module) -> None:
        optimizer = sgd(model)
        with torch.autocast(device(model).type, autocast or torch.bfloat16, enabled=autocast is not None):
            backward(model.train(), batches, lambda loss: loss)
        optimizer.step()

    return step


def scaled(batches: list[torch.Tensor], fused: bool, unscale: bool = False) -> Step:
    """fp16 style: a GradScaler, with an optimiser that unscales by itself if `fused`."""

    def step(model: nn.Module) -> None:
        optimizer, scaler = sgd(model, fused=fused), torch.amp.GradScaler(device(model).type, init_scale=2.0**10)
        with torch.autocast(device(model).type, torch.float16):
            backward(model.train(), batches, scaler.scale)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    return step


def closure(batches: list[torch.Tensor], keyword: bool = False) -> Step:
    """A closure that zeroes the gradients itself."""

    def step(model: nn.Module) -> None:
        optimizer = sgd(model.train())

        def evaluate() -> torch.Tensor:
            optimizer.zero_grad()
            losses = [model(input_ids=ids, labels=ids).loss for ids in (batch.to(device(model)) for batch in batches)]
            loss = sum(losses) / len(losses)
            loss.backward()
            return loss

        if keyword:
            optimizer.step(closure=evaluate)
        else:
            optimizer.step(evaluate)

    return step


def accelerated(batches: list[torch.Tensor]) -> Step:
    """Accelerate's wrapped optimiser."""

    def step(model: nn.Module) -> None:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=device(model).type == "cpu", gradient_accumulation_steps=len(batches))
        model, optimizer = accelerator.prepare(model.train(), sgd(model))
        for ids in (batch.to(accelerator.device) for batch in batches):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
                optimizer.step()
                optimizer.zero_grad()

    return step


def trainer(trainer_class: Any, arguments_class: Any, dataset: Any, accumulate: int, **given: Any) -> Step:
    """One step of transformers' Trainer, or of one of TRL's."""

    def step(model: nn.Module) -> None:
        optimizer = sgd(model)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        with tempfile.TemporaryDirectory() as folder:
            arguments = arguments_class(
                output_dir=folder,
                max_steps=1,
                gradient_accumulation_steps=accumulate,
                per_device_train_batch_size=2,
                max_grad_norm=0,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=device(model).type == "cpu",
                data_seed=0,
                seed=0,
                **given,
            )
            made = trainer_class(model=model, args=arguments, train_dataset=dataset, optimizers=(optimizer, constant))
            made.remove_callback(PrinterCallback)
            made.train()

    return step


def travelled(trainer: Any, steps: int = 1000, lr: float = 2e-5) -> float:
    """How far the trainer's own AdamW takes what learns under a steady random gradient, over what float32 covers."""
    parameters = learning(trainer.model)
    trainer.create_optimizer()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in parameters} <= held, "the optimiser has lost the parameters"
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.empty(p.shape).normal_(generator=generator).to(p.device) for p in parameters]
    start = [parameter.detach().clone().float() for parameter in parameters]
    exact = [value.clone().requires_grad_() for value in start]
    reference = torch.optim.AdamW(exact, lr=lr, weight_decay=0.0)
    for group in optimizer.param_groups:
        group.update(lr=lr, weight_decay=0.0)
    for _ in range(steps):
        for parameter, twin, gradient in zip(parameters, exact, gradients, strict=True):
            parameter.grad, twin.grad = gradient.to(parameter.dtype), gradient.clone()
        optimizer.step()
        reference.step()
    moved, should = (
        sum((value.detach().float() - begun).square().sum() for value, begun in zip(values, start, strict=True)).sqrt()
        for values in (parameters, exact)
    )
    return (moved / should).item()


def in_processes(
    makes: Mapping[str, Callable[[], Any]],
    batches: list[torch.Tensor],
    ways: Sequence[str] = ("ddp",),
    processes: int = 2,
) -> dict[tuple[str, str], tuple[float, float]]:
    """`effect` under DistributedDataParallel, FSDP2 ("fsdp") or DeepSpeed ("zero1", "zero2", "zero3"), by name and way.

    What makes a model is called in each process; each takes its share of the batches.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(_rank, (processes, port, makes, batches, folder, ways), processes)
        found = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(processes)]
    return {key: max((pairs[key] for pairs in found), key=lambda pair: abs(pair[0] - 1)) for key in found[0]}


def _rank(
    rank: int,
    processes: int,
    port: int,
    makes: Mapping[str, Callable[[], Any]],
    batches: list[torch.Tensor],
    out: str,
    ways: Sequence[str],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    mine = batches[rank::processes]
    steps = {way: zero(mine, int(way[-1])) if "zero" in way else sharded_or_not(mine, way == "fsdp") for way in ways}
    found = {(name, way): effect(make(), step) for name, make in makes.items() for way, step in steps.items()}
    torch.save(found, os.path.join(out, f"{rank}.pt"))
    dist.destroy_process_group()


def sharded_or_not(batches: list[torch.Tensor], shard: bool) -> Step:
    """DDP, or FSDP2 with a group for each block."""

    def step(model: nn.Module) -> None:
        if shard:
            for block in model.base_model.model.model.layers:
                fully_shard(block)
        wrapped = fully_shard(model) if shard else nn.parallel.DistributedDataParallel(model)
        optimizer = sgd(model)
        backward(wrapped.train(), batches, lambda loss: loss)
        optimizer.step()

    return step


def zero(batches: list[torch.Tensor], stage: int) -> Step:
    """DeepSpeed, with gradient accumulation over the batches; in ZeRO-3 all is in parts, however small."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled first, for minutes
    settings = {
        "train_micro_batch_size_per_gpu": len(batches[0]),
        "gradient_accumulation_steps": len(batches),
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }

    def step(model: nn.Module) -> None:
        engine = deepspeed.initialize(model=model.train(), optimizer=sgd(model), config=settings)[0]
        for ids in batches:
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()

    return step
