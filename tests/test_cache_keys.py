"""The disk cache: keys that tell weights apart."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from caching import BITS, DTYPES, each_dtype, key, normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kasa.spectral import cache, checksum


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of tens of entries are then summed in as many pieces as large ones."""
    monkeypatch.setattr(checksum, "LANES", 4)
    monkeypatch.setattr(checksum, "BLOCK", 64)


# Keys: the same -------------------------------------------------------------------------------------------------

VIEWS: dict[str, Any] = {
    "transposed": lambda w: w.T,
    "columns": lambda w: w[:, 1:6],
    "rows from an odd offset": lambda w: w[1:],
    "rows of an odd number": lambda w: w[:7, :3],
    "every other": lambda w: w[::2, ::3],
    "transposed columns": lambda w: w[:, 2:].T,
    "one row": lambda w: w[3:4],
    "one column": lambda w: w[:, 3:4],
    "expanded": lambda w: w[:1].expand(5, -1),
    "part of three dimensions": lambda w: w.view(3, 3, 7)[:, 1],
    "parameter": torch.nn.Parameter,
}


@each_dtype
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.usefixtures("small_pieces")
def test_a_view_has_the_key_of_its_copy(view: Any, dtype: torch.dtype) -> None:
    seen = view(normal(9, 7, dtype=dtype))
    assert key(seen) == key(seen.detach().clone(memory_format=torch.contiguous_format))


def test_a_view_of_many_pieces_has_the_key_of_its_copy() -> None:
    """Without smaller pieces."""
    w = normal(1000, 1011)
    assert w.numel() * 4 > 8 * 5 * checksum.LANES
    assert key(w.T) == key(w.T.contiguous()) != key(w)
    assert key(w[:, 5:]) == key(w[:, 5:].contiguous())


def test_a_key_is_the_same_tomorrow() -> None:
    """On every machine and torch: entries would be lost silently."""
    w = torch.arange(401 * 1001.0).view(401, 1001)
    assert key(w, k=2, end="top", tolerance=1e-9) == "8e88ed89040efa595c4dfb20b3997595"


def test_a_key_does_not_depend_on_the_order_of_settings() -> None:
    assert key(normal(3, 4), k=1, end="top") == key(normal(3, 4), end="top", k=1)


def test_keys_are_made_under_any_mode_and_write_nothing() -> None:
    w = torch.nn.Parameter(normal(5, 6))
    expected = key(w)
    checksum._odd.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        assert key(w) == expected
        assert key(w.clone()) == expected
    assert key(w) == expected
    assert torch.equal(w, normal(5, 6))


def test_a_key_takes_one_thread_and_gives_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of short sums: to hand them between threads takes seconds on shared cores."""
    before, seen = torch.get_num_threads(), []
    words = checksum._words

    def watched(x: Tensor) -> Any:
        seen.append(torch.get_num_threads())
        return words(x)

    monkeypatch.setattr(checksum, "_words", watched)
    torch.set_num_threads(2)
    try:
        key(normal(5, 6))
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_a_key_takes_little_memory() -> None:
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                self.bytes = max(self.bytes, out.untyped_storage().nbytes())
            return out

    whole = normal(4200, 1001)
    for w in (whole, whole.T, whole[:, 1:]):
        with Largest() as largest:
            key(w)
        assert 0 < largest.bytes <= checksum.BLOCK < whole.numel() * 4 / 2


# Keys: another --------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.usefixtures("small_pieces")
def test_every_bit_of_every_entry_counts(dtype: torch.dtype) -> None:
    w = normal(5, 7, dtype=dtype)
    width = torch.finfo(dtype).bits
    found = {key(w)}
    for i, j, bit in itertools.product(range(5), range(7), range(width)):
        changed = w.clone()
        mask = 1 << bit if bit < width - 1 else -(1 << bit)
        changed.view(BITS[width // 8])[i, j] ^= mask
        found.add(key(changed))
    assert len(found) == 1 + 5 * 7 * width


@each_dtype
@pytest.mark.usefixtures("small_pieces")
def test_the_place_of_every_entry_counts(dtype: torch.dtype) -> None:
    w = torch.arange(1, 36).view(5, 7).to(dtype)
    found = {key(w)}
    for one, other in itertools.combinations(range(35), 2):
        swapped = w.clone().view(-1)
        swapped[[one, other]] = swapped[[other, one]]
        found.add(key(swapped.view(5, 7)))
    assert len(found) == 1 + 35 * 34 // 2


@each_dtype
@pytest.mark.usefixtures("small_pieces")
def test_pairs_of_signs_do_not_cancel(dtype: torch.dtype) -> None:
    """The highest bit is the one that sums modulo 2^64 lose first."""
    w = normal(5, 7, dtype=dtype)
    for start in (w, w.abs()):
        found = {key(start), key(-start)}
        for one, other in itertools.combinations(range(35), 2):
            changed = start.clone().view(-1)
            changed[[one, other]] *= -1
            found.add(key(changed.view(5, 7)))
        assert len(found) == 2 + 35 * 34 // 2


@each_dtype
@pytest.mark.usefixtures("small_pieces")
def test_weights_of_two_values_have_keys_of_their_own(dtype: torch.dtype) -> None:
    """Bits that differ in few places, in many entries."""
    some = torch.rand(300, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    for one, other in ((1.0, -1.0), (0.0, -0.0), (0.0, 1.0), (0.0, 2.0), (1.0, 2.0)):
        weights = torch.where(some, one, other).to(dtype)
        assert len({key(w) for w in weights}) == len(some.view(300, 24).unique(dim=0))


def test_entries_count_far_inside_and_at_the_borders_of_pieces() -> None:
    """Without smaller pieces."""
    w = torch.zeros(900, 1001)
    found = {key(w)}
    edge = 2 * checksum.LANES
    for place in (0, 1, edge - 2, edge - 1, edge, edge + 1, 2 * edge, 3 * edge + 7, w.numel() - 2, w.numel() - 1):
        changed = w.clone()
        changed.view(-1)[place] = 1.0
        found.add(key(changed))
    assert len(found) == 11


@pytest.mark.usefixtures("small_pieces")
def test_arrangements_of_the_same_entries_have_keys_of_their_own() -> None:
    w = normal(8, 8)
    arranged = [w, w.T, w.flip(0), w.flip(1), w.roll(1, 0), w.roll(1, 1), w.view(4, 16), w.view(16, 4), w.view(1, 64)]
    assert len({key(x) for x in arranged}) == len(arranged)


def test_the_shape_and_the_dtype_count_where_the_bits_are_equal() -> None:
    zeros = [torch.zeros(shape) for shape in ((2, 6), (3, 4), (4, 3), (1, 12), (12, 1), (3, 5))]
    assert len({key(x) for x in zeros}) == len(zeros)
    assert len({key(torch.zeros(4, 4, dtype=dtype)) for dtype in DTYPES}) == len(DTYPES)


def test_each_setting_and_the_version_count(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(3, 4)
    settings: list[dict[str, object]] = [
        {},
        {"k": 1},
        {"k": 1.0},
        {"k": "1"},
        {"k": True},
        {"k": 2},
        {"r": 1},
        {"k": 1, "end": "top"},
        {"k": 1, "end": "bottom"},
        {"k": 1, "end": None},
        {"k": "1, 'end': 'top'"},
        {"k": 1, "tolerance": 1e-9},
        {"k": 1, "tolerance": 1.0000000000000001e-9 * (1 + 2**-52)},
    ]
    found = {key(w, **each) for each in settings}
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    found |= {key(w, **each) for each in settings}
    assert len(found) == 2 * len(settings)
