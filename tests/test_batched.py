"""Small weights of one shape decomposed together, as on CUDA, here on the CPU: against torch's SVD in float64."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kasa.spectral import Engine, Spectrum, stacks
from peft_kasa.spectral.algorithms import Operator, Triples
from peft_kasa.spectral.algorithms import error as error_of
from peft_kasa.spectral.algorithms.batched import _orthonormal, batched, fits
from peft_kasa.spectral.sweep import Job, sweep

each_end = pytest.mark.parametrize("end", ["top", "bottom"])
each_shape = pytest.mark.parametrize("shape", [(90, 90), (150, 80), (80, 150)], ids=str)
SPECTRA: dict[str, Any] = {
    "linear": lambda x: x,
    "power law": lambda x: x**-0.5,
    "steep": lambda x: 10 ** (-9 * x),
    "all one": torch.ones_like,
    "pairs": lambda x: (x * 20).round() + 1,
    "rank 3": lambda x: (x <= x[2]).to(x),
    "rank 1": lambda x: (x <= x[0]).to(x),
    "a thousandth of the norm": lambda x: torch.where(x <= x[0], 1e3, x),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def of_spectrum(shape: tuple[int, int], name: str, seed: int = 0) -> Tensor:
    k = min(shape)
    s = SPECTRA[name](torch.linspace(1 / k, 1, k, dtype=torch.float64)).sort(descending=True).values
    u, v = (torch.linalg.qr(normal(size, k, seed=seed + size)).Q for size in shape)
    return ((u * s) @ v.T).float()


def stack(shape: tuple[int, int], count: int = 6) -> dict[str, Tensor]:
    return {f"{index}": normal(*shape, seed=index, dtype=torch.float32) for index in range(count)}


def check(cut: Spectrum, w: Tensor, k: int, end: str, bound: float = 2e-5) -> None:
    """Orthonormal, the values of torch's SVD, singular triples to the gates, descending, canonical signs."""
    u, s, v = (part.double() for part in cut)
    norm = torch.linalg.vector_norm(w.double()).item()
    true = torch.linalg.svdvals(w.double())
    assert (u.shape, s.shape, v.shape) == ((len(w), k), (k,), (k, w.shape[1]))
    for vectors in (u.T, v):
        assert (vectors @ vectors.T - torch.eye(k)).abs().max() <= 2e-6
    assert torch.allclose(s, true[:k] if end == "top" else true[len(true) - k :], rtol=1e-6, atol=1e-6 * norm)
    assert (w.double() @ v.T - u * s).norm() <= bound * norm
    assert (w.double().T @ u - v.T * s).norm() <= bound * norm
    assert (s.diff() <= 0).all()
    assert (u.amax(0) >= u.abs().amax(0) * (1 - 1e-6)).all()


def same_bits(a: Spectrum, b: Spectrum) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that the engine decomposed one by one, with batches on the CPU too."""
    names: list[str] = []
    computed = Engine._computed

    def noted(self: Engine, w: Tensor, k: int, end: str, name: str, chain: Any) -> Any:
        names.append(name)
        return computed(self, w, k, end, name, chain)

    monkeypatch.setattr(stacks, "_devices", {"cpu"})
    monkeypatch.setattr(Engine, "_computed", noted)
    return names


# Accuracy -------------------------------------------------------------------------------------------------------


def beyond_gram(weights: dict[str, Tensor], k: int, end: Any) -> list[str]:
    """Those that the Gram matrix alone does not suffice for: one by one they need LAPACK in float64."""
    engine = Engine()
    chains = {name: engine._chain(w.shape[0], w.shape[1], k, end) for name, w in weights.items()}
    return [name for name, w in weights.items() if engine._computed(w, k, end, name, chains[name])[2] != "gram"]


@each_end
@each_shape
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_each_of_a_batch_is_torchs(spectrum: str, shape: tuple[int, int], end: Any, alone: list[str]) -> None:
    """Beside others of the same spectrum; and none goes alone that the same algorithm suffices for one by one."""
    for k in (1, 9):
        weights = {str(seed): of_spectrum(shape, spectrum, seed) for seed in range(5)}
        for name, cut in Engine(precision="float64").many(weights, k, end).items():
            check(cut, weights[name], k, end)
        one_by_one = sorted(alone)
        assert one_by_one == beyond_gram(weights, k, end)
        assert spectrum not in ("linear", "power law", "all one", "pairs") or not one_by_one
        alone.clear()


@each_end
@each_shape
def test_a_mixed_batch_is_as_good_as_its_members_alone(shape: tuple[int, int], end: Any, alone: list[str]) -> None:
    weights = stack(shape) | {name: of_spectrum(shape, name) for name in SPECTRA}
    weights |= {"tiny": normal(*shape) * 1e-20, "huge": normal(*shape, dtype=torch.float32) * 1e20}
    weights |= {"zero": torch.zeros(shape), "tinier": normal(*shape) * 1e-30, "16 bits": normal(*shape).bfloat16()}
    cuts = Engine(precision="float64").many(weights, 4, end)
    one_by_one = sorted(alone)
    assert list(cuts) == list(weights)
    assert one_by_one == sorted(beyond_gram(weights, 4, end))
    assert "zero" in one_by_one
    assert not {"tiny", "tinier", "huge", "16 bits", *stack(shape)} & set(one_by_one)
    for name, cut in cuts.items():
        if name != "zero":
            scale = weights[name].double().abs().max()
            check(cut._replace(s=cut.s / scale), weights[name].double() / scale, 4, end)
    assert same_bits(cuts["zero"], Engine(precision="float64")(weights["zero"], 4, end))


@each_end
def test_the_cuts_are_those_of_the_engine(end: Any, alone: list[str]) -> None:
    weights = stack((60, 40))
    cuts = Engine(precision="float64").many(weights, 3, end)
    assert not alone
    for name, w in weights.items():
        for part, expected in zip(cuts[name], Engine(precision="float64")(w, 3, end), strict=True):
            assert torch.allclose(part, expected, rtol=0, atol=1e-6)


@each_end
@pytest.mark.parametrize("spectrum", ["linear", "rank 3", "steep"])
def test_errors_are_measured_as_the_engine_does(spectrum: str, end: Any) -> None:
    weights = [of_spectrum((70, 50), spectrum, seed).double() for seed in range(4)]
    found, missed = batched(torch.stack(weights), 4, end, 1e-5)
    for index, w in enumerate(weights):
        expected = error_of(Operator(w), Triples(*(part[index] for part in found)))
        assert missed[index].item() == pytest.approx(expected, rel=1e-3, abs=1e-14)


def test_a_basis_that_is_not_orthonormal_has_an_infinite_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_kasa.spectral.algorithms import batched as module

    whole = module._basis

    def skewed(*given: Any) -> Tensor:
        basis = whole(*given)
        basis[1, 0] += 1e-4
        return basis

    monkeypatch.setattr(module, "_basis", skewed)
    missed = batched(torch.stack(list(stack((70, 50)).values())).double(), 3, "top", 1e-5)[1]
    assert torch.isinf(missed).tolist() == [False, True, False, False, False, False]


def test_the_power_of_two_is_taken_out_exactly() -> None:
    """Of norms that the engine brings to about one, and of no others; what is zero or not finite is left out."""
    sizes = [1.0, 1e-20, 0.0, 1e-200, 3e20, torch.nan, torch.inf, 1e-9]
    whole = torch.stack([normal(6, 5) * size for size in sizes])
    a, scale, places = stacks._usable(whole)
    assert places == [0, 1, 3, 4, 7]
    assert torch.equal(a * scale[:, None, None], whole[places])
    assert scale[[0, 4]].tolist() == [1, 1]
    assert ((a[1:4].abs().amax((1, 2)) >= 0.5) & (a[1:4].abs().amax((1, 2)) < 1)).all()
    assert (torch.frexp(scale).mantissa == 0.5).all()


def test_rows_that_have_no_cholesky_factor_are_made_orthonormal_beside_those_that_have() -> None:
    rows = normal(3, 4, 9)
    rows[1, 2] = rows[1, 3]
    made = _orthonormal(rows)
    assert torch.allclose(made @ made.mT, torch.eye(4).double(), atol=1e-12)
    assert torch.allclose(rows @ made.mT @ made, rows, atol=1e-12)


def test_exact_triples_leave_no_direction_and_go_alone(alone: list[str]) -> None:
    """Residuals of exactly nothing: there is nothing to make orthonormal rows of."""
    weights = {str(i): torch.zeros(40, 40).fill_diagonal_(1.0 + i) * (torch.arange(40) < 5) for i in range(4)}
    for end in ("top", "bottom"):
        for name, cut in Engine().many(weights, 5, end).items():
            check(cut, weights[name], 5, end)


# What goes alone ------------------------------------------------------------------------------------------------


def test_what_misses_the_gate_goes_alone(
    alone: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = stacks.batched

    def worse(*given: Any) -> tuple[Triples, Tensor]:
        found, missed = whole(*given)
        found.s[2] *= 2
        return found, missed.index_fill_(0, torch.tensor(2), 1e-3)

    monkeypatch.setattr(stacks, "batched", worse)
    with caplog.at_level(logging.INFO, logger="peft_kasa"):
        cuts = Engine().many(stack((60, 40)), 3)
    assert alone == ["2"]
    assert [record.getMessage() for record in caplog.records] == ["2: not with the others of its shape, trying alone"]
    assert same_bits(cuts["2"], Engine()(stack((60, 40))["2"], 3, name="2"))


def test_the_gate_is_the_engines(alone: list[str], caplog: pytest.LogCaptureFixture) -> None:
    weights = stack((60, 40))
    cuts = Engine(tolerance=0).many(weights, 3)
    assert sorted(alone) == sorted(weights)
    assert all(same_bits(cuts[name], Engine(tolerance=0)(w, 3, name=name)) for name, w in weights.items())


def test_a_batch_that_fails_goes_alone(alone: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise torch.linalg.LinAlgError("no")

    monkeypatch.setattr(stacks, "batched", fails)
    cuts = Engine().many(stack((60, 40)), 3)
    assert sorted(alone) == sorted(cuts)
    check(cuts["4"], stack((60, 40))["4"], 3, "top")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float, alone: list[str]) -> None:
    weights = stack((60, 40))
    weights["3"][1, 1] = bad
    with pytest.raises(ValueError, match=r"3: `w` has to be finite\. Found 1"):
        Engine().many(weights, 3)


def test_nothing_but_zeros(alone: list[str]) -> None:
    cuts = Engine().many({str(i): torch.zeros(60, 40) for i in range(4)}, 3)
    assert all((cut.s == 0).all() and torch.allclose(cut.u.T @ cut.u, torch.eye(3)) for cut in cuts.values())


# What goes together ---------------------------------------------------------------------------------------------


def groups(weights: dict[str, Tensor], k: int = 2, device: str | None = None) -> list[list[str]]:
    return stacks.groups(weights, k, device)


@each_end
@pytest.mark.parametrize("workers", [1, 2])
def test_shapes_are_told_apart_and_the_order_is_kept(workers: int, end: Any, alone: list[str]) -> None:
    shapes = [(60, 40), (40, 60), (50, 50), (60, 40), (30, 45), (40, 60)] * 4
    weights = {f"layers.{i}": normal(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)}
    weights |= {"other": normal(33, 44).float(), "large": normal(900, 800).float()}
    cuts = Engine(workers=workers).many(weights, 3, end)
    assert list(cuts) == list(weights)
    for name, cut in cuts.items():
        check(cut, weights[name], 3, end)
    assert sorted(alone) == ["large", "other"]


def test_groups_hold_each_name_once_by_shape(alone: list[str]) -> None:
    weights = {f"{m}x{n} {i}": torch.zeros(m, n) for i in range(5) for m, n in ((60, 40), (40, 60))}
    assert groups(weights) == [[f"60x40 {i}" for i in range(5)], [f"40x60 {i}" for i in range(5)]]
    assert [len(names) for names in groups(stack((60, 40), stacks.LEAST))] == [stacks.LEAST]


ALONE: dict[str, tuple[int, tuple[int, int], int, str | None]] = {
    "few": (3, (60, 40), 2, None),
    "large": (4, (800, 769), 2, None),
    "long": (4, (30000, 80), 2, None),
    "no rank": (4, (60, 40), 0, None),
    "no room": (4, (60, 40), 13, None),
    "another device": (4, (60, 40), 2, "mps"),
}


@pytest.mark.parametrize(("count", "shape", "k", "device"), ALONE.values(), ids=ALONE)
def test_what_gains_nothing_is_left_alone(
    count: int, shape: tuple[int, int], k: int, device: str | None, alone: list[str]
) -> None:
    weights = {str(i): torch.zeros(1).expand(shape) for i in range(count)}
    assert groups(weights, k, device) == [[name] for name in weights]
    assert fits(40, 12)
    assert not fits(40, 13)


def test_batches_are_bounded_and_even(alone: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "ENTRIES", 8 * 60 * 40)
    parts = groups(stack((60, 40), 17))
    assert [len(names) for names in parts] == [6, 6, 5]
    assert [name for names in parts for name in names] == list(stack((60, 40), 17))


@pytest.mark.parametrize("k", [0, 13, 40])
def test_any_rank(k: int, alone: list[str]) -> None:
    for name, cut in Engine().many(stack((60, 40)), k).items():
        check(cut, stack((60, 40))[name], k, "top") if k else None
        assert cut.u.shape == (60, k)


def test_only_cuda_without_a_cache_and_with_the_rules_goes_together(
    tmp_path: Path, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry of a cache is what a weight gives alone: its key need not say which others there were."""
    weights = stack((60, 40))
    for engine in (Engine(cache=tmp_path), Engine(algorithm="gram")):
        alone.clear()
        cuts = engine.many(weights, 3)
        assert sorted(alone) == sorted(weights)
        assert all(same_bits(cuts[name], Engine()(w, 3, name=name)) for name, w in weights.items())
    monkeypatch.setenv("PEFT_KASA_CACHE", str(tmp_path / "other"))
    alone.clear()
    Engine().many(weights, 3)
    assert sorted(alone) == sorted(weights)
    monkeypatch.undo()
    assert stacks._devices == {"cuda"}
    assert groups(weights) == [[name] for name in weights]
    assert groups(weights, 2, "cuda") == [list(weights)]


CONTEXTS: dict[str, Any] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "device": lambda: torch.device("meta"),
}


@each_end
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("context", CONTEXTS)
def test_what_the_caller_has_switched_on_changes_no_bit(context: str, workers: int, end: Any, alone: list[str]) -> None:
    weights = stack((60, 40)) | {f"turned {name}": w.T for name, w in stack((60, 40)).items()}
    learning = {name: torch.nn.Parameter(w) for name, w in weights.items()}
    expected = Engine(workers=1).many(weights, 3, end)
    with CONTEXTS[context]():
        cuts = Engine(workers=workers).many(learning, 3, end)
    assert all(same_bits(cuts[name], expected[name]) for name in weights)
    assert not any(part.requires_grad for cut in cuts.values() for part in cut)
    assert not alone
    assert all(torch.equal(w, weights[name]) for name, w in learning.items())


def test_a_batch_counts_as_its_weights() -> None:
    order: list[str] = []
    jobs = [
        Job(str(size), (size, size), torch.device("cpu"), lambda size=size: order.append(str(size)), [], str, count)  # type: ignore[misc]
        for size, count in ((3, 1), (9, 1), (5, 10))
    ]
    sweep(jobs, "working", workers=1)
    assert order == ["5", "9", "3"]
