"""The engine against torch's float64 SVD, on plain matrices and on those that break decompositions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from decomposing import (
    ENDS,
    check,
    check_exact,
    each_end,
    each_shape,
    normal,
    of_spectrum,
    quick,
    same_bits,
    seeds,
    sizes,
    truth,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_kasa.spectral import Engine
from peft_kasa.spectral.cache import entries
from peft_kasa.spectral.threads import cores

# Accuracy -------------------------------------------------------------------------------------------------------


@each_end
@each_shape
def test_every_rank_is_torchs(shape: tuple[int, int], end: Any) -> None:
    w = normal(*shape)
    for k in range(min(shape) + 1):
        check_exact(Engine()(w, k, end), w, k, end)


@quick
@given(sizes, sizes, st.floats(0, 1), st.sampled_from(ENDS), seeds)
def test_every_shape_is_torchs(m: int, n: int, share: float, end: Any, seed: int) -> None:
    w = normal(m, n, seed=seed)
    k = round(share * min(m, n))
    check_exact(Engine()(w, k, end), w, k, end)


@each_end
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_float_is_decomposed_as_it_is_stored(dtype: torch.dtype, end: Any) -> None:
    w = normal(11, 8, dtype=dtype)
    check_exact(Engine()(w, 3, end), w, 3, end)


@each_end
def test_views_and_parameters_are_decomposed_as_their_values(end: Any) -> None:
    w = torch.nn.Parameter(normal(8, 11))
    cut = Engine()(w.T, 3, end)
    check_exact(cut, w.detach().T, 3, end)
    assert not cut.u.requires_grad


def test_the_two_ends_make_the_whole() -> None:
    w = normal(9, 14)
    whole = sum((Engine()(w, k, end).split().dense() for k, end in ((4, "top"), (5, "bottom"))), torch.zeros(9, 14))
    assert torch.allclose(whole, w, atol=1e-5)


def test_top_is_the_default() -> None:
    assert torch.equal(Engine()(normal(5, 4), 2).s, Engine()(normal(5, 4), 2, end="top").s)


@each_end
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 5), (2000, 1300), (1300, 2000), (1500, 1500)], ids=str)
def test_the_weight_is_not_written(shape: tuple[int, int], dtype: torch.dtype, end: Any) -> None:
    """Large ones are read in float64 some rows at a time, through a buffer."""
    w = normal(*shape, dtype=dtype)
    Engine()(w, 3, end)
    assert torch.equal(w, normal(*shape, dtype=dtype))


def test_a_large_float64_weight_is_read_as_it_is() -> None:
    w = of_spectrum(1900, 1300, "power law")
    assert torch.allclose(Engine(precision="float64")(w, 5).s, truth(w, 5, "top")[1], rtol=1e-9)


# Degenerate -----------------------------------------------------------------------------------------------------

DEGENERATE = {
    "zeros": torch.zeros(7, 5),
    "wide zeros": torch.zeros(4, 6),
    "identity": torch.eye(6),
    "orthogonal": torch.linalg.qr(normal(6, 6)).Q,
    "duplicate rows": normal(3, 5).repeat(3, 1),
    "duplicate columns": normal(5, 3).repeat(1, 3),
    "zero rows": torch.cat([normal(4, 5), torch.zeros(3, 5)]),
    "zero columns": torch.cat([normal(5, 4), torch.zeros(5, 3)], 1),
    "one entry": torch.zeros(5, 6).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(-4.0)),
    "constant": torch.full((5, 8), 3.0),
    "rank deficient": normal(9, 2) @ normal(2, 8, seed=1),
    "repeated values": torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0])),
    "tiny": normal(6, 5) * 1e-20,
    "huge": normal(6, 5) * 1e20,
    "a tiny row": normal(6, 5) * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e-30])[:, None],
    "row": normal(1, 9),
    "column": normal(9, 1),
    "zero row": torch.zeros(1, 9),
    "zero column": torch.zeros(9, 1),
    "a number": torch.tensor([[-2.0]]),
}


@each_end
@pytest.mark.parametrize("w", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_weights_give_orthonormal_finite_factors(w: Tensor, end: Any) -> None:
    """With singular values that are torch's; triples of equal ones are not unique, but are triples."""
    for k in range(min(w.shape) + 1):
        cut = Engine()(w, k, end)
        check(cut, w, k)
        norm = w.double().norm()
        assert torch.allclose(cut.s.double(), truth(w, k, end)[1], rtol=1e-6, atol=1e-7 * norm.item())
        u, s, v = (part.double() for part in cut)
        assert (w.double() @ v.T - u * s).norm() <= 1e-6 * norm
        assert (w.double().T @ u - v.T * s).norm() <= 1e-6 * norm


# Determinism ----------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@each_end
def test_repeated_calls_give_the_same_bits(end: Any) -> None:
    w = normal(120, 90)
    assert same_bits(Engine()(w, 8, end), Engine()(w.clone(), 8, end))


@each_end
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
def test_thread_counts_do_not_change_the_bits(shape: tuple[int, int], end: Any) -> None:
    """Nor does the call change the count."""
    w, cuts = normal(*shape), []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        cuts.append(Engine()(w, 8, end))
        assert torch.get_num_threads() == count
    assert all(same_bits(cut, cuts[0]) for cut in cuts)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("shape", "count"), [((300, 280), 1), ((1200, 2000), min(2, cores()))], ids=str)
@each_end
def test_the_size_alone_decides_how_many_threads_run(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], count: int, end: Any
) -> None:
    """What the test above rests on where a weight is too small, or the machine, for threads to change the bits."""
    counts: set[int] = set()
    for name in ("eigh", "svd", "qr", "lu_factor_ex", "lu_solve", "cholesky_ex", "solve_triangular"):
        routine = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *a, _f=routine, **k: counts.add(torch.get_num_threads()) or _f(*a, **k)
        )
    for allowed in (1, 2, 3):
        torch.set_num_threads(allowed)
        Engine()(normal(*shape), 2, end)
    assert counts == {count}


@pytest.mark.usefixtures("threads")
def test_an_error_does_not_change_the_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="did not converge"):
        Engine()(normal(5, 4), 2)
    assert torch.get_num_threads() == 2


@each_end
def test_transposing_swaps_the_sides(end: Any) -> None:
    cut, turned = Engine()(normal(9, 6), 3, end), Engine()(normal(9, 6).T, 3, end)
    assert torch.allclose(cut.split().dense(), turned.split().dense().T, atol=1e-6)


# The cache ------------------------------------------------------------------------------------------------------


def test_a_cached_answer_has_the_same_bits_and_costs_no_decomposition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = normal(60, 40)
    first = Engine(cache=tmp_path)(w, 5, "bottom", "a")
    assert same_bits(first, Engine()(w, 5, "bottom", "a"))
    monkeypatch.setattr(torch.linalg, "eigh", None)
    assert same_bits(first, Engine(cache=tmp_path)(w, 5, "bottom", "a"))
    monkeypatch.setenv("PEFT_KASA_CACHE", str(tmp_path))
    assert same_bits(first, Engine()(w, 5, "bottom", "a"))


@pytest.mark.parametrize("change", ["k", "end", "weight", "tolerance", "seed", "algorithm", "name"])
def test_other_settings_are_not_answered_from_the_cache(tmp_path: Path, change: str) -> None:
    w = normal(60, 40)
    Engine(cache=tmp_path)(w, 5)
    settings: dict[str, Any] = {
        "tolerance": {"tolerance": 1e-7},
        "seed": {"seed": 1},
        "algorithm": {"algorithm": "lapack64"},
    }
    arguments: dict[str, Any] = {"k": {"k": 4}, "end": {"end": "bottom"}, "weight": {"w": w + 1}, "name": {"name": "b"}}
    Engine(cache=tmp_path, **settings.get(change, {}))(**({"w": w, "k": 5} | arguments.get(change, {})))
    assert len(entries(tmp_path)) == 2


# Errors ---------------------------------------------------------------------------------------------------------

W = normal(5, 4)
REFUSED = {
    "NaN": ((W.clone().index_fill_(0, torch.tensor(1), torch.nan), 2, "top"), "has to be finite. Found 4 NaN"),
    "infinite": ((W.clone().fill_(torch.inf), 2, "top"), "has to be finite. Found 20 NaN or infinite entries"),
    "meta": ((W.to("meta"), 2, "top"), "on the meta device: load the weight first"),
    "rank too large": ((W, 5, "top"), "0 <= k <= min(5, 4) = 4. Found 5"),
    "negative rank": ((W, -1, "top"), "0 <= k <= min(5, 4) = 4. Found -1"),
    "fractional rank": ((W, 3.0, "top"), "The rank has to be a whole number. Found 3.0"),
    "beyond float32": ((W.double() * 1e60, 2, "top"), "singular values that torch.float32 holds. Found"),
    "whole numbers": ((W.long(), 2, "top"), "floating point. Found torch.int64 of shape (5, 4)"),
    "complex": ((W.to(torch.complex64), 2, "top"), "floating point. Found torch.complex64 of shape (5, 4)"),
    "eight bits": ((W.to(torch.float8_e4m3fn), 2, "top"), "floating point. Found torch.float8_e4m3fn of shape (5, 4)"),
    "sparse": ((W.to_sparse(), 2, "top"), "has to be a matrix of floating point"),
    "one dimension": ((W[0], 2, "top"), "has to be a matrix of floating point. Found torch.float32 of shape (4,)"),
    "three dimensions": ((W[None], 2, "top"), "has to be a matrix of floating point"),
    "another end": ((W, 2, "middle"), "`end` has to be 'top' or 'bottom'. Found 'middle'"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_errors_give_the_rule_and_what_was_found(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Engine()(*arguments)


SETTINGS = {
    "algorithm": ({"algorithm": "magic"}, "`algorithm` has to be one of auto, gram, krylov, "),
    "precision": ({"precision": "bfloat16"}, "`precision` has to be 'float32' or 'float64'. Found 'bfloat16'"),
    "tolerance": ({"tolerance": -1.0}, "`tolerance` has to be >= 0. Found -1.0"),
    "not a number": ({"tolerance": float("nan")}, "`tolerance` has to be >= 0. Found nan"),
    "workers": ({"workers": 0}, "`workers` has to be >= 1. Found 0"),
}


@pytest.mark.parametrize(("arguments", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_are_checked(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Engine(**arguments)


UNFIT = {
    "krylov at the bottom": ("krylov", (400, 300), 4, "bottom", "'krylov' finds the top only"),
    "krylov without room": ("krylov", (40, 30), 4, "top", "'krylov' needs room"),
    "square at the top": ("square", (300, 300), 4, "top", "'square' finds the bottom only"),
    "square and not square": ("square64", (300, 301), 4, "bottom", "'square64' needs a square weight"),
    "rectangular at the top": ("rectangular", (300, 301), 4, "top", "'rectangular' finds the bottom only"),
}


@pytest.mark.parametrize(("algorithm", "shape", "k", "end", "message"), UNFIT.values(), ids=UNFIT)
def test_an_algorithm_that_cannot_is_refused(
    algorithm: str, shape: tuple[int, int], k: int, end: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Engine(algorithm=algorithm)(torch.zeros(shape), k, end)
