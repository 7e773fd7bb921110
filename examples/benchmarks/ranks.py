"""What sharing the start of an adapter between ranks gains: seconds to wrap SmolLM2-135M with KaSA, r = 8, all linears.

    torchrun --nproc-per-node 2 examples/benchmarks/ranks.py

Alternates between ranks that share the modules and ranks that each decompose all of them (PEFT_KASA_SHARE=0).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from base_model import smollm2
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from peft_kasa import KaSAConfig

REPEATS = 3


def main() -> None:
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    times: dict[str, list[float]] = {"1": [], "0": []}
    sums = set()
    for share in ["1", "0"] * REPEATS:
        os.environ["PEFT_KASA_SHARE"] = share
        model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
        dist.barrier()
        start = time.perf_counter()
        wrapped = get_peft_model(model, KaSAConfig(r=8, target_modules="all-linear"))
        dist.barrier()
        times[share].append(time.perf_counter() - start)
        slots = [value.double().sum() for name, value in wrapped.named_parameters() if "peft_kasa_" in name]
        sums.add(torch.stack(slots).sum().item())
    everyone: list[set[float]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, sums)
    if dist.get_rank() == 0:
        shared, alone = statistics.median(times["1"]), statistics.median(times["0"])
        print(f"{len(everyone)} ranks: {alone:.2f} s each for all, {shared:.2f} s shared: x {alone / shared:.2f}")
        print(f"checksums of the adapter on all ranks and in all runs: {len(set.union(*everyone))} different")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
