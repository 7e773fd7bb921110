"""The engine's algorithms: which is chosen, when a slower one takes over, and that each is right."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from decomposing import ENDS, SPECTRA, check, check_exact, each_end, normal, of_spectrum, same_bits, seeds, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_kasa.spectral import Engine

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
