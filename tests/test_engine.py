"""The engine against torch's float64 SVD, on plain matrices and on those that break decompositions."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_kasa.spectral import Engine, Spectrum
from peft_kasa.spectral.cache import entries
from peft_kasa.spectral.threads import cores

quick = settings(deadline=None, max_examples=60, derandomize=True)
SHAPES = [(1, 1), (1, 9), (9, 1), (6, 6), (7, 12), (12, 7), (40, 33)]
ENDS = ["top", "bottom"]
each_end = pytest.mark.parametrize("end", ENDS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

sizes = st.integers(1, 12)
seeds = st.integers(0, 1000)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truth(w: Tensor, k: int, end: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same triples by torch's SVD in float64."""
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    part = slice(0, k) if end == "top" else slice(len(s) - k, len(s))
    return u[:, part], s[part], v[part]


def check(cut: Spectrum, w: Tensor, k: int) -> None:
    """What holds of every answer: shapes, float32, finite, orthonormal, descending, canonical signs."""
    m, n = w.shape
    assert (cut.u.shape, cut.s.shape, cut.v.shape) == ((m, k), (k,), (k, n))
    assert all(part.dtype == torch.float32 and torch.isfinite(part).all() for part in cut)
    u, s, v = (part.double() for part in cut)
    assert torch.allclose(u.T @ u, torch.eye(k).double(), atol=1e-6)
    assert torch.allclose(v @ v.T, torch.eye(k).double(), atol=1e-6)
    assert (s.diff() <= 0).all()
    assert (s >= 0).all()
    assert (u.amax(0) >= u.abs().amax(0) * (1 - 1e-6)).all() if k else True  # ties in float32 apart


def check_exact(cut: Spectrum, w: Tensor, k: int, end: str) -> None:
    """The singular values, and the part of the matrix that the triples make, are torch's."""
    check(cut, w, k)
    u, s, v = truth(w, k, end)
    norm = w.double().norm()
    assert torch.allclose(cut.s.double(), s, rtol=1e-6, atol=1e-7 * norm.item())
    assert ((cut.u * cut.s).double() @ cut.v.double() - (u * s) @ v).norm() <= 1e-6 * norm


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


def same_bits(a: Spectrum, b: Spectrum) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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


# Falling back ---------------------------------------------------------------------------------------------------


def conditioned(m: int, n: int, kappa: float) -> Tensor:
    """A float64 matrix whose singular values fall evenly, on a logarithmic scale, from 1 to 1 / kappa."""
    k = min(m, n)
    u, v = (
        torch.linalg.qr(normal(m, k, dtype=torch.float64)).Q,
        torch.linalg.qr(normal(n, k, seed=1, dtype=torch.float64)).Q,
    )
    return u * kappa ** -torch.linspace(0, 1, k, dtype=torch.float64) @ v.T


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (300, 280), (280, 280)], ids=str)
def test_an_ill_conditioned_weight_takes_slower_ways_says_so_and_is_accurate(
    shape: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """At kappa = 1e12 the Gram matrix holds 1e-24 beside 1: float64 does not."""
    w = conditioned(*shape, 1e12)
    with caplog.at_level(logging.INFO, logger="peft_kasa"):
        cut = Engine()(w, 4, "bottom", "q_proj")
    assert all(
        re.match(r"q_proj: \w+: error .* above 1.0e-05, trying a slower", r.getMessage()) for r in caplog.records
    )
    assert caplog.records
    check(cut, w, 4)
    u, s, v = truth(w, 4, "bottom")
    assert torch.allclose(cut.s.double(), s, rtol=1e-3)
    assert ((u * cut.u).sum(0).abs() > 1 - 1e-6).all()
    assert ((v * cut.v).sum(1).abs() > 1 - 1e-6).all()


def test_without_the_fallback_it_would_not_be_accurate() -> None:
    """So that the test above means something."""
    w = conditioned(30, 20, 1e12)
    cut = Engine(tolerance=1e9)(w, 4, "bottom")
    u, _, _ = truth(w, 4, "bottom")
    assert ((u * cut.u).sum(0).abs() < 1 - 1e-3).any()


def test_a_routine_that_fails_hands_over(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with caplog.at_level(logging.INFO, logger="peft_kasa"):
        check_exact(Engine()(normal(40, 30), 5), normal(40, 30), 5, "top")
    assert "gram failed (did not converge), trying a slower algorithm" in caplog.text


@each_end
def test_a_plain_weight_takes_the_fast_way(end: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="peft_kasa"):
        Engine()(normal(40, 30), 5, end)
    assert not caplog.records


def test_the_tolerance_decides_and_what_it_cannot_reach_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    w = normal(40, 30)
    with caplog.at_level(logging.INFO, logger="peft_kasa"):
        cut = Engine(tolerance=0.0)(w, 5, "bottom")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "there is nothing more exact" in caplog.text
    check_exact(cut, w, 5, "bottom")


# Algorithms -----------------------------------------------------------------------------------------------------

BIG = (320, 290)  # beyond what the Gram matrix alone is chosen for
SPECTRA = {  # of singular values, by place in (0, 1]
    "flat": lambda x: torch.ones_like(x),
    "linear": lambda x: 1 - x + 1e-3,
    "power law": lambda x: (512 * x) ** -0.55,
    "cliff": lambda x: torch.where(x < 0.1, 1.0, 1e-4),
    "steps": lambda x: (x * 8).ceil() / 8,
    "rank 20": lambda x: (x < 20 / 290).double(),
    "exponential": lambda x: 10 ** (-5 * x),
}
USES = {  # algorithm: shape, end
    "gram top": ("gram", BIG, "top"),
    "gram bottom": ("gram", BIG, "bottom"),
    "krylov": ("krylov", BIG, "top"),
    "krylov, wide": ("krylov", BIG[::-1], "top"),
    "square": ("square", (290, 290), "bottom"),
    "square64": ("square64", (290, 290), "bottom"),
    "rectangular": ("rectangular", BIG, "bottom"),
    "rectangular, wide": ("rectangular", BIG[::-1], "bottom"),
    "lapack": ("lapack", BIG, "top"),
    "lapack64": ("lapack64", BIG, "bottom"),
}


def of_spectrum(m: int, n: int, name: str, seed: int = 0) -> Tensor:
    k = min(m, n)
    values = SPECTRA[name](torch.linspace(1 / k, 1, k, dtype=torch.float64))
    u, v = (torch.linalg.qr(normal(size, k, seed=seed + size, dtype=torch.float64)).Q for size in (m, n))
    return (u * values.sort(descending=True).values) @ v.T


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("algorithm", "shape", "end"), USES.values(), ids=USES)
def test_every_algorithm_is_right_at_every_spectrum(
    algorithm: str, shape: tuple[int, int], end: Any, spectrum: str
) -> None:
    """Alone where it can, with the help of the next ones where it cannot: the answer is torch's."""
    w = of_spectrum(*shape, spectrum).float()
    norm = torch.linalg.vector_norm(w.double()).item()
    for k in (1, 8, 33):
        cut = Engine(algorithm=algorithm, precision="float64")(w, k, end)
        u, s, v = cut
        for vectors in (u.T, v):
            assert (vectors @ vectors.T - torch.eye(k)).abs().max() <= 1e-6
        assert (w.double() @ v.T - u * s).norm() <= 2e-5 * norm
        assert (w.double().T @ u - v.T * s).norm() <= 2e-5 * norm
        assert torch.allclose(s, truth(w, k, end)[1], rtol=1e-6, atol=1e-6 * norm)


@pytest.mark.parametrize("name", [name for name in USES if not name.startswith("lapack")])
def test_every_algorithm_succeeds_alone_where_it_is_chosen(name: str, caplog: pytest.LogCaptureFixture) -> None:
    algorithm, shape, end = USES[name]
    with caplog.at_level(logging.INFO, logger="peft_kasa"):
        w = of_spectrum(*shape, "power law" if end == "top" else "linear").float()
        cut = Engine(algorithm=algorithm)(w, 8, end)
    assert not caplog.records
    check(cut, w, 8)
    u, s, v = truth(w, 8, end)
    assert torch.allclose(cut.s.double(), s, rtol=1e-6)
    assert ((cut.u * cut.s).double() @ cut.v.double() - (u * s) @ v).norm() <= 1e-5 * torch.linalg.vector_norm(w)


HARD = {  # what each needs one of its steps for
    "krylov, once the space is invariant": ("krylov", of_spectrum(*BIG, "rank 20"), 8, "top"),
    "lapack in float32, all of it": ("lapack", normal(400, 300), 300, "top"),
}


@pytest.mark.parametrize(("algorithm", "w", "k", "end"), HARD.values(), ids=HARD)
def test_no_slower_algorithm_has_to_help(
    algorithm: str, w: Tensor, k: int, end: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="peft_kasa"):
        Engine(algorithm=algorithm)(w.float(), k, end)
    assert not caplog.records


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.integers(257, 340),
    st.integers(257, 340),
    st.booleans(),
    st.integers(1, 60),
    st.sampled_from(list(SPECTRA)),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from(ENDS),
    seeds,
)
def test_what_is_chosen_is_right(
    m: int, n: int, square: bool, k: int, spectrum: str, dtype: torch.dtype, end: Any, seed: int
) -> None:
    """Values, orthonormality, and that the cut is as large, or as small, as the best of its rank."""
    w = of_spectrum(m, m if square else n, spectrum, seed).to(dtype)
    cut = Engine(precision="float64")(w, k, end)
    u, s, v = cut
    norm = torch.linalg.vector_norm(w.double())
    assert (u.T @ u - torch.eye(k)).abs().max() <= 1e-6
    assert (v @ v.T - torch.eye(k)).abs().max() <= 1e-6
    best = truth(w, k, end)[1]
    assert torch.allclose(s, best, rtol=1e-6, atol=1e-7 * norm.item())
    assert ((w.double() @ v.T).norm() - best.norm()).abs() <= 1e-7 * norm


@pytest.mark.parametrize("spectrum", ["linear", "power law"])
@pytest.mark.parametrize("shape", [(900, 900), (900, 1200)], ids=str)
def test_the_bottom_is_exact_beside_itself(shape: tuple[int, int], spectrum: str) -> None:
    """The dropped norm is within 1e-9 of the optimum, and the values within 1e-8, as docs/decomposition.md promises."""
    w = of_spectrum(*shape, spectrum).float()
    cut = Engine(precision="float64")(w, 8, "bottom")
    best = truth(w, 8, "bottom")[1]
    assert ((cut.s - best).abs() / best).max() <= 1e-8
    assert ((w.double() @ cut.v.T).norm() / best.norm() - 1).abs() <= 1e-9


def test_names_and_seeds_choose_the_random_start() -> None:
    w = of_spectrum(*BIG, "power law").float()
    cut = Engine()(w, 8, "top", "a")
    assert same_bits(cut, Engine()(w, 8, "top", "a"))
    assert not same_bits(cut, Engine()(w, 8, "top", "b"))
    assert not same_bits(cut, Engine(seed=1)(w, 8, "top", "a"))


def test_precision_is_the_dtype_of_the_answer() -> None:
    w = normal(9, 6)
    assert Engine(precision="float64")(w, 3).s.dtype == torch.float64
    assert Engine(precision="float64")(w, 0).u.dtype == torch.float64
    assert torch.equal(Engine(precision="float64")(w, 3).s.float(), Engine()(w, 3).s)


def test_the_answer_comes_back_to_the_weights_device() -> None:
    assert Engine(device="cpu")(normal(9, 6), 3).u.device.type == "cpu"


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
