"""One stream for modules that see the same inputs: what each reads is the sum over its own updates."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import X, normal, same, stream
from torch import Tensor

from peft_kasa.spectral.covariance import Covariance
from peft_kasa.spectral.shared import Shared


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a batch that some stream took in."""
    taken: list[int] = []
    whole = Covariance.update

    def update(*given: Any) -> None:
        taken.append(1)
        whole(*given)

    monkeypatch.setattr(Covariance, "update", update)
    return taken


def test_the_same_input_is_taken_in_once_a_pass(products: list[int]) -> None:
    shared, passes = Shared(), [(normal(2, 9, 6, seed=i), normal(2, 9, 6, seed=9 + i)) for i in range(3)]
    for x, y in passes:
        for name in "qkv":
            shared.update(name, x)
        shared.update("o", y)
        for name in ("gate", "up"):
            shared.update(name, x + y)
    assert len(products) == 9
    assert [names for names, _ in shared.groups()] == [("q", "k", "v"), ("o",), ("gate", "up")]
    assert shared["q"] is shared["k"] is shared["v"]
    assert same(shared["v"], stream([x for x, _ in passes]), 1e-12)
    assert same(shared["o"], stream([y for _, y in passes]), 1e-12)
    assert same(shared["up"], stream([x + y for x, y in passes]), 1e-12)


def test_names_part_where_their_inputs_do_and_keep_what_they_shared() -> None:
    shared, (a, b, c, d) = Shared(), [normal(9, 4, seed=i) for i in range(4)]
    seen: dict[str, list[Tensor]] = {"q": [a, b, d], "k": [a, b, d], "v": [a, c, d]}
    for i in range(3):
        for name, xs in seen.items():
            shared.update(name, xs[i])
    assert [names for names, _ in shared.groups()] == [("q", "k"), ("v",)]
    for name, xs in seen.items():
        assert same(shared[name], stream(xs), 1e-12)


def test_the_same_batch_again_counts_again() -> None:
    shared, x = Shared(), normal(9, 4)
    for name in ("q", "k", "q", "k", "q"):
        shared.update(name, x)
    assert (shared["q"].count, shared["k"].count) == (27, 18)


def test_an_input_that_is_written_to_is_another() -> None:
    shared, x = Shared(), normal(9, 4)
    first = x.clone()
    shared.update("q", x)
    x *= 2
    shared.update("k", x)
    assert same(shared["q"], stream([first]), 1e-12)
    assert same(shared["k"], stream([2 * first]), 1e-12)


M = torch.arange(9) < 5
OTHER: dict[str, tuple[Any, ...]] = {
    "mask": (X, M),
    "no token masked": (X, M | True),
    "weight": (X, None, 2.0),
    "dtype": (X.float(),),
    "shape": (X[None],),
    "values": (X + 1e-9,),
}


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER)
def test_inputs_are_the_same_only_with_all_that_comes_with_them(other: tuple[Any, ...], products: list[int]) -> None:
    shared = Shared()
    shared.update("q", X)
    shared.update("k", *other)
    shared.update("v", *[given.clone() if isinstance(given, Tensor) else given for given in other])
    assert [names for names, _ in shared.groups()] == [("q",), ("k", "v")]
    assert len(products) == 2


def test_inputs_on_two_devices_are_told_apart_before_they_are_compared() -> None:
    shared = Shared()
    shared.update("q", X)
    with pytest.raises(ValueError, match="on the meta device"):
        shared.update("k", X.to("meta"))


def test_a_mask_that_is_written_to_is_another() -> None:
    shared, mask = Shared(), M.clone()
    shared.update("q", X, mask)
    mask[0] = False
    shared.update("k", X, mask)
    assert (shared["q"].count, shared["k"].count) == (5, 4)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("qkvo"), st.integers(0, 2), st.booleans()), max_size=30))
def test_what_a_name_reads_is_always_the_sum_of_its_own_updates(updates: list[tuple[str, int, bool]]) -> None:
    """Whatever the order: sharing changes the cost alone."""
    shared, alone = Shared(), {name: Covariance(4) for name in "qkvo"}
    for name, seed, part in updates:
        for made in (lambda *a, n=name: shared.update(n, *a), alone[name].update):
            made(normal(9, 4, seed=seed), M if part else None)
    for name in {name for name, _, _ in updates}:
        assert same(shared[name], alone[name], 1e-12)
    assert sorted(itertools.chain(*(names for names, _ in shared.groups()))) == sorted({name for name, *_ in updates})


def test_a_name_of_its_own_is_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Shared()
    shared.update("q", X)
    monkeypatch.setattr(copy, "deepcopy", lambda _: pytest.fail("copied"))
    before = shared["q"]
    shared.update("q", 2 * X)
    shared.update("o", X)
    assert shared["q"] is before
    assert before.count == 18


def test_a_batch_that_raises_leaves_no_trace() -> None:
    shared, bad = Shared(), X.clone().index_fill_(0, torch.tensor(3), torch.inf)
    for name in ("q", "k"):
        shared.update(name, X)
    for name in ("q", "v"):
        with pytest.raises(ValueError, match="Found 4 NaN or infinite entries"):
            shared.update(name, torch.cat([X.repeat(500, 1), bad]))
    assert [names for names, _ in shared.groups()] == [("q", "k")]
    assert same(shared["q"], stream([X]), 0.0)
    with pytest.raises(ValueError, match=re.escape("'v' has seen no inputs. Found inputs of ['k', 'q'].")):
        shared["v"]


def test_sums_are_kept_where_one_says() -> None:
    for device in ("cpu", "meta", None):
        shared = Shared(device)
        for name in ("q", "k"):
            shared.update(name, X)
        assert shared["k"].triangle.blocks[0].device.type == shared["k"].mean.device.type == (device or "cpu")
