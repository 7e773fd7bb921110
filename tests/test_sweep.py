"""Many decompositions at once: workers, errors, interruption, progress, ranks."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from launch import torchrun
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


COMPUTED = {"many": 1, "together": 1, "kasa": 1, "unshared": 2, "different": 2, "more": 2}  # on how many ranks


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found in every case; they are started once for all."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun("ranks_worker.py", str(folder), *COMPUTED, "meta")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", COMPUTED)
def test_two_ranks_end_with_the_same_bits(case: str, both: list[dict[str, Any]]) -> None:
    """Each weight or batch is decomposed on one rank; on both where sharing is off, or they have other weights."""
    first, second = (found[case] for found in both)
    shared = {
        name for name in first["values"].keys() & second["values"] if (case, name[:8]) != ("different", "layers.1")
    }
    assert len(shared) >= 4
    assert all(torch.equal(first["values"][name], second["values"][name]) for name in shared)
    assert all(torch.equal(first["values"][name], first["alone"][name]) for name in first["alone"])
    counts = [(first["ran"] + second["ran"]).count(name) for name in set(first["ran"]) & set(first["names"])]
    assert counts
    assert set(counts) == {COMPUTED[case]}


def test_a_rank_without_weights_keeps_no_other_waiting(both: list[dict[str, Any]]) -> None:
    """As where one rank loads the model, and the others wait for it on the meta device."""
    first = both[0]["meta"]
    assert first["values"].keys() == first["alone"].keys()
    assert all(torch.equal(value, first["alone"][name]) for name, value in first["values"].items())


def test_an_error_on_one_rank_is_an_error_on_both(both: list[dict[str, Any]]) -> None:
    errors = [found["error"] for found in both]
    assert all("layers.1: `w` has to be finite" in error for error in errors)
    assert sum("could not decompose its share" in error for error in errors) == 1
