"""Many decompositions at once: workers, errors, interruption, progress, ranks."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from peft_kasa import PiSSAConfig
from peft_kasa.spectral import Engine
from peft_kasa.spectral.ranks import assigned
from peft_kasa.spectral.sweep import Job, sweep


def weights() -> dict[str, Tensor]:
    shapes = [(300, 280), (40, 30), (30, 40), (290, 290), (1500, 1450), (7, 5)]
    return {
        f"layers.{index}": torch.randn(*shape, generator=torch.Generator().manual_seed(index))
        for index, shape in enumerate(shapes)
    }


@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("workers", [1, 2, 3, None])
def test_many_gives_the_bits_of_one(workers: int | None, end: Any) -> None:
    cuts = Engine(workers=workers).many(weights(), 3, end)
    assert list(cuts) == list(weights())
    for name, w in weights().items():
        assert all(torch.equal(a, b) for a, b in zip(cuts[name], Engine()(w, 3, end, name), strict=True))


def test_the_thread_count_is_as_before() -> None:
    before = torch.get_num_threads()
    Engine(workers=2).many(weights(), 2)
    assert torch.get_num_threads() == before


def test_an_error_names_its_weight_and_stops_the_rest() -> None:
    broken = weights() | {"layers.9": torch.full((400, 300), torch.nan)}
    with pytest.raises(ValueError, match=r"layers\.9: `w` has to be finite"):
        Engine(workers=2).many(broken, 2)


expected_weights = weights()


def job(name: str, run: Any) -> Job:
    return Job(name, (4, 4), torch.device("cpu"), run, [], str)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_what_has_not_begun_does_not_begin_after_a_failure(workers: int, failure: type[BaseException]) -> None:
    done = itertools.count()

    def fail() -> None:
        raise failure("stop")

    def work() -> None:
        time.sleep(0.02)
        next(done)

    before = threading.active_count()
    with pytest.raises(failure, match="stop"):
        sweep([job("0", fail), *(job(str(i), work) for i in range(1, 60))], "working", workers)
    assert next(done) < 30
    assert threading.active_count() == before


def test_the_costliest_goes_first() -> None:
    order: list[str] = []
    jobs = [
        Job(str(size), (size, size), torch.device("cpu"), lambda size=size: order.append(str(size)), [], str)  # type: ignore[misc]
        for size in (3, 9, 5)
    ]
    sweep(jobs, "working", workers=1)
    assert order == ["9", "5", "3"]


def test_the_progress_bar_is_silent_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    Engine().many(weights(), 2)
    assert capfd.readouterr() == ("", "")
    Engine(progress=True).many(weights(), 2)
    assert "decomposing" in capfd.readouterr().err


def test_workers_keep_no_gradients() -> None:
    learning = {name: torch.nn.Parameter(w) for name, w in weights().items()}
    assert not any(part.requires_grad for cut in Engine(workers=2).many(learning, 2).values() for part in cut)


CONTEXTS: dict[str, Any] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_what_the_caller_has_switched_on_changes_no_bit(context: str, end: Any, workers: int) -> None:
    expected = Engine().many(expected_weights, 3, end)
    with CONTEXTS[context]():
        cuts = Engine(workers=workers).many(expected_weights, 3, end)
    assert all(torch.equal(a, b) for name in cuts for a, b in zip(cuts[name], expected[name], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_nor_does_the_default_dtype(dtype: torch.dtype) -> None:
    expected = Engine().many(expected_weights, 3, "bottom"), Engine().many(expected_weights, 3)
    torch.set_default_dtype(dtype)
    try:
        cuts = Engine().many(expected_weights, 3, "bottom"), Engine().many(expected_weights, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    for found, plain in zip(cuts, expected, strict=True):
        assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], plain[name], strict=True))


@pytest.mark.parametrize("context", CONTEXTS)
def test_an_adapter_starts_the_same_within_them(context: str) -> None:
    def wrapped(inside: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(300, 280), torch.nn.Linear(280, 300), torch.nn.Linear(300, 20))
        config: Any = PiSSAConfig(r=3, target_modules=["0", "1", "2"])
        with inside:
            whole = get_peft_model(model, config)  # type: ignore[arg-type]
        return {name: value.detach() for name, value in whole.named_parameters() if "peft_kasa" in name}

    plain, found = wrapped(nullcontext()), wrapped(CONTEXTS[context]() if context != "device" else nullcontext())
    assert all(torch.equal(plain[name], found[name]) for name in plain)


# Ranks ----------------------------------------------------------------------------------------------------------


def test_each_rank_gets_about_as_much() -> None:
    costs = [float(1 + i % 7) for i in range(40)]
    owners = assigned(costs, 3)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= max(costs)


SCRIPT = Path(__file__).with_name("ranks_worker.py")


def launch(case: str, folder: Path, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), case, str(folder)],
            env=base | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    return [
        subprocess.CompletedProcess(p.args, p.wait(), out) for p in processes for out in [p.communicate(timeout=200)[0]]
    ]


@pytest.mark.parametrize(
    ("case", "computed"), [("many", 1), ("together", 1), ("kasa", 1), ("unshared", 2), ("different", 2), ("more", 2)]
)
def test_two_ranks_end_with_the_same_bits(case: str, computed: int, tmp_path: Path) -> None:
    """Each weight or batch is decomposed on one rank; on both where sharing is off, or they have other weights."""
    results = launch(case, tmp_path, **({"PEFT_KASA_SHARE": "0"} if case == "unshared" else {}))
    assert all(result.returncode == 0 for result in results), [result.stdout[-2000:] for result in results]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    shared = {
        name for name in first["values"].keys() & second["values"] if (case, name[:8]) != ("different", "layers.1")
    }
    assert len(shared) >= 4
    assert all(torch.equal(first["values"][name], second["values"][name]) for name in shared)
    assert all(torch.equal(first["values"][name], first["alone"][name]) for name in first["alone"])
    counts = [(first["ran"] + second["ran"]).count(name) for name in set(first["ran"]) & set(first["names"])]
    assert counts
    assert set(counts) == {computed}


def test_a_rank_without_weights_keeps_no_other_waiting(tmp_path: Path) -> None:
    """As where one rank loads the model, and the others wait for it on the meta device."""
    results = launch("meta", tmp_path)
    assert all(result.returncode == 0 for result in results), [result.stdout[-2000:] for result in results]
    first = torch.load(tmp_path / "0.pt")
    assert first["values"].keys() == first["alone"].keys()
    assert all(torch.equal(value, first["alone"][name]) for name, value in first["values"].items())


def test_an_error_on_one_rank_is_an_error_on_both(tmp_path: Path) -> None:
    results = launch("broken", tmp_path)
    assert all(result.returncode == 3 for result in results), [result.stdout[-2000:] for result in results]
    assert sum("layers.1: `w` has to be finite" in result.stdout for result in results) == 2
    assert sum("could not decompose its share" in result.stdout for result in results) == 1
