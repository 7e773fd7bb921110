"""A training step beside PEFT's LoRA: time of forward and backward, memory of activations, on SmolLM2-135M.

    python examples/benchmarks/training_step.py                    # bfloat16 and float32 bases, r = 8
    python examples/benchmarks/training_step.py --dtypes float32 --members kasa pissa --repeats 12

Each model is a base of its own with adapters on all linear layers but the head, dropout 0, in training mode. They take
turns on the same batch. Compared is the median over turns of a step's CPU time (of this process on all its cores, which
other work on the machine disturbs least; on a GPU, of its wall time) over LoRA's in the same turn. Activations are what
the forward pass keeps for the backward pass, weights not counted.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from base_model import smollm2
from compare_methods import saved_for_backward
from measured import commit, machine
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from peft_kasa import KaSAConfig, LoRAXSConfig, MiLoRAConfig, PiSSAConfig, SORSAConfig, SVFitConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEMBERS: dict[str, Callable[..., PeftConfig]] = {
    "kasa": KaSAConfig,
    "pissa": PiSSAConfig,
    "milora": MiLoRAConfig,
    "sorsa": SORSAConfig,
    "lora_xs": LoRAXSConfig,
    "svfit": SVFitConfig,
}
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--members", nargs="+", choices=MEMBERS, default=list(MEMBERS))
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=8)
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"{describe()}, torch {torch.__version__}, {torch.get_num_threads()} threads, commit {commit()}")
    print(f"SmolLM2-135M, r = {given.r}, batches of {given.batch_size} x {given.tokens} tokens, {given.repeats} turns")
    for dtype in given.dtypes:
        compare(getattr(torch, dtype), given)


def describe() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else str(machine().get("processor", "CPU"))


def compare(dtype: torch.dtype, given: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (given.batch_size, given.tokens), generator=generator).to(DEVICE)
    batch = {"input_ids": ids, "labels": ids}
    makers: dict[str, Callable[[Any], Any]] = {
        "base alone": lambda base: base.requires_grad_(False),
        "LoRA": lambda base: get_peft_model(base, LoraConfig(r=given.r, target_modules="all-linear")),
    }
    for name in given.members:
        makers[name] = lambda base, name=name: get_peft_model(
            base, MEMBERS[name](r=given.r, target_modules="all-linear", regularize=False)
        )
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=dtype).to(DEVICE)
    models = {name: make(copy.deepcopy(base)).train() for name, make in makers.items()}
    del base
    gc.collect()
    kept = {name: saved_for_backward(model, batch) / 1e6 for name, model in models.items()}
    times = in_turns({name: stepper(model, ids) for name, model in models.items()}, given.repeats)
    print(f"\n{str(dtype).removeprefix('torch.')}\n{'':12} seconds  of LoRA's  activations, MB")
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times["LoRA"], strict=True))
        print(f"{name:12} {statistics.median(own):7.2f}  {ratio:9.3f}  {kept[name]:15.0f}")


def stepper(model: Any, ids: torch.Tensor) -> Step:
    """Forward and backward. The embeddings' output asks for a gradient, as under gradient checkpointing, so that all
    models, the base alone too, run the same backward pass through the base."""
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    embedded = whole.get_input_embeddings()(ids).detach()

    def step() -> None:
        model(inputs_embeds=embedded.clone().requires_grad_(), labels=ids).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def in_turns(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, one turn of all after another; the first turn does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            seconds = timed(step)
            if turn:
                times[name].append(seconds)
    return times


def timed(step: Step) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    step()
    return time.process_time() - start


if __name__ == "__main__":
    main()
