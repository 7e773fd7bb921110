"""Calibration on data: memory and time of ours beside PEFT's preprocess_corda, and of gradients in groups.

    python examples/benchmarks/calibration.py                        # SmolLM2-135M, 8 sequences of 128 tokens
    python examples/benchmarks/calibration.py --sequences 64 --tokens 512 --repeats 3

Inputs (CorDA): PEFT keeps one float32 matrix a module and takes one sequence at a time; ours keeps one float64 triangle
for modules with the same inputs. Gradients (LoRA-SB): the adapter's starts are computed group by
group, so that only `memory` bytes of mean gradients are held; beside it all at once. Peaks are of the resident memory,
above what the process held before, sampled while it ran. Runs alternate; times are medians.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from base_model import smollm2
from measured import alternately, resident
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import calib_cov_distribution, target_modules
from torch import Tensor
from transformers import AutoModelForCausalLM

from peft_kasa import CorDAConfig, LoRASBConfig, calibrate
from peft_kasa.adapter.files.statistics import Statistics
from peft_kasa.spectral import triangle

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUP = 64 * 2**20
BOUND = 512 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (given.sequences, given.tokens), generator=generator)
    rows = [{"input_ids": row.tolist()} for row in ids]
    print(
        f"SmolLM2-135M float32, {given.sequences} sequences of {given.tokens} tokens, {torch.get_num_threads()} threads"
    )
    with tempfile.TemporaryDirectory() as folder:
        inputs(ids, rows, given.repeats, folder)
    gradients(rows, given.repeats)


def base() -> Any:
    """The model, every page of its file read already."""
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def inputs(ids: Tensor, rows: list[dict[str, Any]], repeats: int, folder: str) -> None:
    config = LoraConfig(target_modules=NAMES, init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))
    model = base()

    def theirs(_: object) -> tuple[float, dict[str, Tensor]]:
        def run() -> None:
            for row in ids:
                model(input_ids=row[None], use_cache=False)

        with torch.no_grad():
            _, peak = peaked(lambda: calib_cov_distribution(model, config, run, None, None))
        found = {name: module.covariance_matrix for name, module in target_modules(model, config)}
        for _, module in target_modules(model, config):
            del module.covariance_matrix, module.sample_count
        return peak, found

    def ours(size: int, memory: int | None = None) -> Callable[[object], tuple[float, Statistics]]:
        def run(_: object) -> tuple[float, Statistics]:
            given: dict[str, Any] = {"batch_size": size, "progress": False}
            if memory is not None:
                given |= {"memory": memory, "path": Path(tempfile.mkdtemp(dir=folder), "statistics")}
            own = CorDAConfig(r=8, target_modules=NAMES)
            found, peak = peaked(lambda: calibrate(model, rows, own, **given))
            return peak, found

        return run

    work: dict[str, Callable[[object], Any]] = {
        "PEFT": theirs,
        "ours": ours(1),
        "ours, batches of 4": ours(4),
        f"ours, {BOUND >> 20} MB, in a file": ours(4, BOUND),
    }
    clocks, last = alternately(work, repeats)
    (_, matrices), (_, found) = last["PEFT"], last["ours"]
    streams = {id(found.evidence(name)): found.evidence(name) for name in found.names}
    found.save(path := Path(folder, "statistics"))
    packed = path.stat().st_size
    errors = [
        (found.evidence(name).matrix() / len(ids) - matrix).norm() / matrix.norm() for name, matrix in matrices.items()
    ]
    unshared = sum(triangle.size(len(matrix)) for matrix in matrices.values())
    print(f"\nInputs of {len(matrices)} modules")
    print(f"  matrices: PEFT {len(matrices)}, {size_of(matrices.values()):.0f} MB of float32;", end=" ")
    print(
        f"ours {len(streams)}, {sum(triangle.size(s.triangle.n) for s in streams.values()) / 1e6:.0f} MB of float64,",
        end=" ",
    )
    print(f"{packed / 1e6:.0f} MB on disk; without sharing, ours would be {unshared / 1e6:.0f} MB")
    for name, clock in clocks.items():
        print(f"  {name:26} {statistics.median(clock.wall):7.2f} s  peak {last[name][0]:6.0f} MB")
    print(f"  largest relative difference of a matrix: {max(errors):.1e}")


def gradients(rows: list[dict[str, Any]], repeats: int) -> None:
    def started(memory: int) -> Callable[[Any], float]:
        def run(model: Any) -> float:
            return peaked(lambda: calibrate(model, rows, memory=memory, progress=False))[1]

        return run

    def adapted() -> Any:
        return get_peft_model(base(), LoRASBConfig(r=8, target_modules=NAMES))

    work = {f"groups of {GROUP >> 20} MB": started(GROUP), "all at once": started(2**60)}
    clocks, last = alternately(work, repeats, adapted)
    model = base()
    whole = sum(4 * m.weight.numel() / 1e6 for n, m in model.named_modules() if n.rpartition(".")[2] in NAMES)
    print(f"\nGradients, the starts included: all of them are {whole:.0f} MB")
    for name, clock in clocks.items():
        print(f"  {name:26} {statistics.median(clock.wall):7.2f} s  peak {last[name]:6.0f} MB")


def size_of(tensors: Any) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def peaked(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the most megabytes that were resident beside those before."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # or what was freed before would hide what is taken now
        libc.malloc_trim(0)
    before, done = resident("VmRSS"), threading.Event()
    most = [before]

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], resident("VmRSS"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return work(), max(most[0], resident("VmRSS")) - before
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
