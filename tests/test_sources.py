"""Covariances, oriented cuts, gradients and slices against their dense definitions, written plainly in float64."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peft_kasa.spectral import Engine, Spectrum
from peft_kasa.spectral.covariance import Axes, Covariance
from peft_kasa.spectral.refine import refined
from peft_kasa.spectral.shared import Shared
from peft_kasa.spectral.sources import Mean, damped, first_step, oriented, slices

ENDS = ["top", "bottom"]
each_end = pytest.mark.parametrize("end", ENDS)
each_mode = pytest.mark.parametrize("centred", [False, True], ids=["as it is", "centred"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(found: Tensor, truth: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found.double() - truth).norm() / truth.norm()).item()


def exact(w: Tensor, k: int, end: str) -> Spectrum:
    """An engine that answers in float64, by torch's SVD."""
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    part = slice(0, k) if end == "top" else slice(len(s) - k, len(s))
    return Spectrum(u[:, part], s[part], v[part])


def noise(w: Tensor, k: int, end: str) -> Spectrum:
    """An engine that knows nothing."""
    return Spectrum(normal(w.shape[0], k), normal(k), normal(k, w.shape[1]))


def by_gram(w: Tensor, k: int, end: str) -> Spectrum:
    """An engine that answers in float64, by the Gram matrix, which spans the square of what W does."""
    if w.shape[0] < w.shape[1]:
        u, s, v = by_gram(w.T, k, end)
        return Spectrum(v.T, s, u.T)
    vectors = torch.linalg.eigh(w.T @ w).eigenvectors
    vectors = vectors[:, :k] if end == "bottom" else vectors[:, len(vectors) - k :]
    u, s, v = torch.linalg.svd(w @ vectors, full_matrices=False)
    return Spectrum(u, s, v @ vectors.T)


def inputs(tokens: int, n: int, seed: int = 0) -> Tensor:
    """float64, as language models have them: correlated, channels of many sizes, some huge, with a mean."""
    x = normal(tokens, n // 4, seed=seed) * torch.arange(1, n // 4 + 1) ** -0.5 @ normal(n // 4, n, seed=1000)
    x = (x + normal(tokens, n, seed=seed + 1)) * torch.exp(0.5 * normal(n, seed=1001))
    x[:, :3] = x[:, :3] * torch.tensor([80.0, 30.0, 10.0]) + torch.tensor([1000.0, -300.0, 10.0])
    return x


def covariance(n: int) -> Tensor:
    x = inputs(8 * n, n)
    return x.T @ x / len(x)


def weight(m: int, n: int) -> Tensor:
    """A power law above a bulk, as trained weights have it."""
    k = min(m, n) // 4
    return normal(m, n) + 3 * normal(m, k, seed=1) * torch.arange(1, k + 1) ** -0.55 @ normal(k, n, seed=2)


# CorDA ----------------------------------------------------------------------------------------------------------

SHAPES = [(64, 64), (120, 64), (64, 120), (200, 200)]
ENGINES = {"float64": exact, "Gram": by_gram, "Engine": Engine(), "noise": noise}
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_engine = pytest.mark.parametrize("engine", ENGINES)


def dense(w: Tensor, c: Tensor, k: int, end: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """CorDA as the paper writes it: W C = U S V^T, and V^T C^-1 with the explicit inverse."""
    u, s, v = torch.linalg.svd(w.to(dtype) @ c.to(dtype), full_matrices=False)
    part = slice(0, k) if end == "top" else slice(len(s) - k, len(s))
    return u[:, part], s[part], v[part] @ torch.linalg.inv(c.to(dtype))


@each_end
@each_shape
@each_engine
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_an_oriented_cut_is_its_definition(shape: tuple[int, int], end: Any, engine: str, damping: float) -> None:
    """With k of 8: the product, and the factors one by one, to 1e-8 whatever the engine."""
    w, c = weight(*shape), damped(covariance(shape[1]), damping)
    value, (u, s, right) = oriented(w, c, 8, end, ENGINES[engine]), dense(w, c, 8, end)
    assert (value.left.shape, value.core.shape, value.right.shape) == ((shape[0], 8), (8,), (8, shape[1]))
    assert {part.dtype for part in value} == {torch.float64}
    assert error(value.dense(), u * s @ right) < 1e-8
    assert torch.allclose(value.core, s, rtol=1e-8)
    sign = (u * value.left).sum(0).sign()
    assert error(value.left, u * sign) < 1e-7  # neighbours turn in their plane more than the plane turns
    assert error(value.right, right * sign[:, None]) < 1e-7


@each_shape
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_the_smallest_triples_need_more_than_a_cut_of_the_product(shape: tuple[int, int], damping: float) -> None:
    """So that the test above means something: rounding U to float32 loses them, and so does C's inverse in float32."""
    w, c = weight(*shape), damped(covariance(shape[1]), damping)
    u, s, right = dense(w, c, 8, "bottom")
    cut = exact(w @ c, 8, "bottom").u.float().double()
    assert error(cut @ cut.T @ w, u * s @ right) > 5e-8
    u32, s32, right32 = dense(w, c, 8, "bottom", torch.float32)
    assert error(u32 * s32 @ right32, u * s @ right) > 1e-3


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("shape", [(100, 100), (120, 64), (64, 120)], ids=str)
def test_nearly_dead_rows_and_channels_do_not_hide_the_other_small_triples(shape: tuple[int, int], size: float) -> None:
    m, n = shape
    w, c = weight(m, n), damped(covariance(n))
    (w if m <= n else w.T)[2:4] *= size  # either makes two small singular values
    u, s, right = dense(w, c, 8, "bottom")
    for engine in (by_gram, Engine()):
        assert error(oriented(w, c, 8, "bottom", engine).dense(), u * s @ right) < 1e-6


@each_end
def test_the_scale_of_the_covariance_moves_the_core_alone(end: Any) -> None:
    w, c = weight(40, 64), covariance(64)
    plain, scaled = oriented(w, c, 5, end, exact), oriented(w, c * 1e12, 5, end, exact)
    assert error(scaled.dense(), plain.dense()) < 1e-9
    assert torch.allclose(scaled.core, plain.core * 1e12)
    assert torch.allclose(scaled.up() * 1e-12, plain.up())


@each_end
@pytest.mark.parametrize("shape", [(20, 20), (12, 20), (20, 12)], ids=str)
def test_any_rank_from_none_to_all(shape: tuple[int, int], end: Any) -> None:
    w, c = weight(*shape), covariance(shape[1])
    assert torch.equal(oriented(w, c, 0, end, Engine()).dense(), torch.zeros(shape).double())
    u, s, right = dense(w, c, min(shape), end)
    whole = oriented(w, c, min(shape), end, exact)
    assert error(whole.dense(), u * s @ right) < 1e-9
    assert error(whole.dense(), w) < 1e-9  # U is square, or its columns span those of W


@each_end
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_of_any_float_is_taken_as_it_is_stored(dtype: torch.dtype, end: Any) -> None:
    w, c = weight(30, 40).to(dtype), covariance(40).float()
    before = w.clone(), c.clone()
    u, s, right = dense(w.double(), c.double(), 4, end)
    assert error(oriented(torch.nn.Parameter(w), c, 4, end, exact).dense(), u * s @ right) < 1e-9
    assert torch.equal(w, before[0])
    assert torch.equal(c, before[1])


@each_end
@each_engine
def test_signs_are_canonical_and_values_descend(end: Any, engine: str) -> None:
    for shape in ((30, 40), (40, 30)):
        value = oriented(weight(*shape), covariance(shape[1]), 6, end, ENGINES[engine])
        assert (value.left.amax(0) == value.left.abs().amax(0)).all()
        assert (value.core.diff() < 0).all()


LOW = normal(20, 3)
POOR: dict[str, tuple[Tensor, Tensor]] = {
    "zero covariance": (normal(12, 20), torch.zeros(20, 20)),
    "covariance of rank 3": (normal(12, 20), LOW @ LOW.T),
    "covariance of rank 3, tall": (normal(30, 20), LOW @ LOW.T),
    "one token": (normal(12, 20), LOW[:, :1] @ LOW[:, :1].T),
    "dead channels": (normal(20, 20), torch.diag((torch.arange(20) > 3).double())),
    "zero weight": (torch.zeros(12, 20), torch.eye(20)),
    "weight of rank 2": (normal(20, 2) @ normal(2, 20), covariance(20)),
    "tiny": (normal(12, 20) * 1e-20, LOW @ LOW.T * 1e-10),
    "huge": (normal(12, 20) * 1e15, LOW @ LOW.T * 1e10),
    "a number": (torch.tensor([[2.0]]), torch.tensor([[0.0]])),
    "deficient, unseen on the diagonal": (torch.eye(400) - 10 * torch.ones(400, 400).triu(1), torch.eye(400)),
}


@each_end
@each_engine
@pytest.mark.parametrize(("w", "c"), POOR.values(), ids=POOR)
def test_deficient_products_stay_finite(w: Tensor, c: Tensor, end: Any, engine: str) -> None:
    """And are U U^T W with orthonormal columns U, for whatever U the engine finds."""
    for k in {0, 1, min(5, *w.shape)}:
        value = oriented(w, c, k, end, ENGINES[engine])
        assert all(torch.isfinite(part).all() for part in value)
        assert (value.core > 0).all()
        u = value.left
        assert torch.allclose(u.T @ u, torch.eye(k).double(), atol=1e-6)
        assert torch.allclose(value.dense(), u @ u.T @ w.double(), rtol=0, atol=1e-12 * w.abs().max().item() * len(w))


@pytest.mark.parametrize("shape", [(12, 20), (30, 20)], ids=str)
def test_what_inputs_reach_is_found_at_the_top_and_the_rest_at_the_bottom(shape: tuple[int, int]) -> None:
    """C of rank 3: W C has three triples, given by the definition with a pseudo-inverse."""
    w, c = normal(*shape, seed=3), LOW @ LOW.T
    top, bottom = oriented(w, c, 3, "top", exact), oriented(w, c, min(shape) - 3, "bottom", exact)
    u, s, v = torch.linalg.svd(w @ c)
    assert error(top.up() @ top.right @ c, u[:, :3] * s[:3] @ v[:3]) < 1e-9
    assert (bottom.left.T @ w @ LOW).norm() < 1e-9 * (w @ LOW).norm()
    assert torch.allclose(bottom.core, bottom.core[:1], rtol=1e-12)  # all at the floor


def test_damping_is_its_definition() -> None:
    c = covariance(16).float()
    truth = c.double() + 0.01 * c.double().diagonal().mean() * torch.eye(16).double()
    assert torch.allclose(damped(c), truth, rtol=1e-15)
    assert torch.equal(damped(c, 0.0), c.double())
    assert torch.equal(damped(torch.zeros(3, 3)), torch.zeros(3, 3).double())
    assert damped(c.bfloat16()).dtype == torch.float64


# Refining -------------------------------------------------------------------------------------------------------


def steep(m: int, n: int, power: float) -> Tensor:
    """Singular values from 1 to 10^-power, evenly on a logarithmic scale."""
    k = min(m, n)
    u, v = torch.linalg.qr(normal(m, k)).Q, torch.linalg.qr(normal(n, k, seed=1)).Q
    return u * 10 ** -torch.linspace(0, power, k, dtype=torch.float64) @ v.T


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)], ids=str)
def test_refined_triples_are_exact_beside_their_own_singular_values(
    shape: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """The last of the 20 is 1e-4 of the first, and what an engine leaves 1e-5 of it."""
    a, truth = steep(*shape, 60.0), exact(steep(*shape, 60.0), 20, "top")
    rough = truth.u + 0.1 * normal(shape[0], 20, seed=2) / shape[0] ** 0.5
    with caplog.at_level(logging.INFO, logger="peft_kasa.spectral.refine"):
        u, s = refined(a, rough)
    assert not caplog.records
    assert torch.allclose(s, truth.s, rtol=1e-9)
    assert ((u * truth.u).sum(0).abs() > 1 - 1e-12).all()
    assert torch.allclose(u.T @ u, torch.eye(20).double(), atol=1e-12)


def test_what_does_not_converge_takes_a_full_svd_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    a = normal(40, 30)
    with caplog.at_level(logging.INFO, logger="peft_kasa.spectral.refine"):
        u, s = refined(a, normal(40, 6, seed=1))
    (record,) = caplog.records
    assert record.getMessage() == "the 6 largest triples of (40, 30) did not converge: taking a full float64 SVD"
    assert torch.allclose(s, exact(a, 6, "top").s)
    assert torch.allclose(a.T @ u, (exact(a, 30, "top").v[:6].T * s) * (u.T @ exact(a, 6, "top").u).diagonal())


def test_triples_of_nothing_are_no_reason_for_a_full_svd(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="peft_kasa.spectral.refine"):
        assert refined(LOW @ LOW.T, normal(20, 5))[1][3:].max() < 1e-12
    assert not caplog.records


@pytest.mark.parametrize("a", [torch.zeros(9, 7), torch.eye(7), LOW @ LOW.T, torch.ones(1, 1)], ids=len)
def test_refining_deficient_matrices_keeps_bases_orthonormal(a: Tensor) -> None:
    for k in range(min(a.shape) + 1):
        u, s = refined(a.double(), normal(len(a), k))
        assert torch.allclose(u.T @ u, torch.eye(k).double(), atol=1e-10)
        assert torch.allclose(s, torch.linalg.svdvals(a.double())[:k], atol=1e-10 * a.norm().item())


# Covariance streams ---------------------------------------------------------------------------------------------


def stacked(batches: list[Tensor], centred: bool) -> Tensor:
    x = torch.cat([batch.double().reshape(-1, batch.shape[-1]) for batch in batches])
    return x - x.mean(0) if centred else x


def stream(batches: list[Tensor], **given: Any) -> Covariance:
    made = Covariance(batches[0].shape[-1], **given)
    for batch in batches:
        made.update(batch)
    return made


def same(a: Covariance, b: Covariance, rtol: float = 1e-6) -> bool:
    pairs = ((a.mean, b.mean), (a.scatter, b.scatter))
    return math.isclose(a.count, b.count) and all(torch.allclose(x, y, rtol=rtol, atol=rtol) for x, y in pairs)


def pca(x: Tensor, k: int) -> Axes:
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    return Axes(s[:k], v[:k], s[:k] ** 2 / (s**2).sum())


def sine(found: Tensor, truth: Tensor) -> float:
    """Of the largest angle between one row and its counterpart."""
    return (found - (found * truth).sum(1, keepdim=True) * truth).norm(dim=1).max().item()


DTYPES = {torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float32: 1e-6, torch.float64: 1e-13}
each_dtype = pytest.mark.parametrize(("dtype", "bound"), DTYPES.items(), ids=str)


@each_mode
@each_dtype
def test_a_stream_is_the_stacked_product(dtype: torch.dtype, bound: float, centred: bool) -> None:
    """Batches of any shape and length; 16-bit inputs lose nothing beyond their storage."""
    batches = [
        (inputs(math.prod(s), 24, seed=i) / 8).to(dtype).reshape(*s, 24)
        for i, s in enumerate([(3, 50), (1300,), (), (2, 1, 7)])
    ]
    kept = copy.deepcopy(batches)
    made, x = stream(batches), stacked(batches, centred)
    assert error(made.matrix(centred), x.T @ x) < bound
    assert error(made.mean, stacked(batches, False).mean(0)) < 1e-12
    assert made.count == len(x) == 1465
    assert made.matrix().dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(batches, kept, strict=True))


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_mean_far_from_zero_costs_no_digits_of_what_is_centred(offset: float) -> None:
    """Nor do many tokens: a plain float32 sum of squares is wrong by 10 % at this mean."""
    x = (normal(1 << 18, 6) + offset).float()
    truth = stacked([x], True)
    assert error(stream([x]).matrix(True), truth.T @ truth) < 5e-7
    assert error(stream(list(x.split(999))).matrix(True), truth.T @ truth) < 5e-7
    if offset:
        assert error((x.T @ x).double() - len(x) * torch.outer(x.mean(0), x.mean(0)), truth.T @ truth) > 1e-2


@each_mode
@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-20, 1e18, 1e38])
def test_no_size_of_float32_inputs_overflows(size: float, centred: bool) -> None:
    x = (normal(50, 5).clamp(-3, 3) * size).float()
    truth = stacked([x], centred) / size
    assert error(stream([x]).matrix(centred) / size**2, truth.T @ truth) < 3e-7
    large = torch.full((4, 3), 6e4, dtype=torch.float16)
    assert torch.equal(stream([large]).matrix(), 4 * large[0].double().outer(large[0].double()))


def test_masked_tokens_do_not_count_whatever_they_hold() -> None:
    x, mask = normal(4, 9, 5, dtype=torch.float32), normal(4, 9, seed=1) > 0
    dirty = torch.where(mask[..., None], x, torch.nan)
    made, truth = Covariance(5), Covariance(5)
    made.update(dirty, mask)
    truth.update(x[mask])
    assert same(made, truth, 0.0)
    assert made.count == mask.sum()
    made.update(dirty, torch.zeros_like(mask))
    made.update(x[:0])
    assert same(made, truth, 0.0)


def test_a_weight_is_a_repetition() -> None:
    x, y = inputs(30, 8), inputs(20, 8, seed=2)
    made = Covariance(8)
    made.update(x, weight=3)
    made.update(y, weight=0.5)
    made.update(y, weight=0.5)
    assert same(made, stream([x, x, x, y]), 1e-12)


def test_corda_s_scaling_of_sequences_is_a_weight() -> None:
    """Each sequence divided by its largest entry."""
    made, truth = Covariance(8), Covariance(8)
    for x in (inputs(30, 8), inputs(20, 8, seed=2)):
        made.update(x, weight=1 / x.max().item() ** 2)
        truth.update(x / x.max().abs())
    assert torch.allclose(made.matrix(), truth.matrix())


@each_mode
@pytest.mark.parametrize("cuts", [(0, 900), (1, 2), (300, 600), (10, 890), (450, 450)], ids=str)
def test_merged_streams_are_one(cuts: tuple[int, int], centred: bool) -> None:
    x = inputs(900, 12).float()
    parts = [stream([part]) if len(part) else Covariance(12) for part in x.tensor_split(cuts)]
    whole = parts[0]
    for part in parts[1:]:
        kept = copy.deepcopy(part)
        whole.merge(part)
        assert same(part, kept, 0.0)
    truth = stacked([x], centred)
    assert error(whole.matrix(centred), truth.T @ truth) < 3e-7
    assert whole.count == 900


def test_nothing_merged_with_nothing_is_nothing() -> None:
    made = Covariance(3)
    made.merge(Covariance(3))
    assert made.count == 0
    made.update(torch.ones(3))
    assert made.matrix().sum() == 9


@each_mode
def test_a_matrix_is_a_copy(centred: bool) -> None:
    made = stream([X])
    before = made.matrix(centred).clone()
    made.matrix(centred).zero_()
    assert torch.equal(made.matrix(centred), before)


def test_a_stream_merged_with_itself_counts_twice() -> None:
    x = inputs(50, 6)
    made = stream([x])
    made.merge(made)
    assert same(made, stream([x, x]), 1e-12)


# Axes -----------------------------------------------------------------------------------------------------------

SPREAD = torch.linspace(3, -1, 48, dtype=torch.float64).exp()[
    torch.randperm(48, generator=torch.Generator().manual_seed(0))
]
SOLVERS: dict[str, Any] = {"eigh": None, "Engine": Engine(), "float64": exact, "noise": noise}
each_solver = pytest.mark.parametrize("engine", SOLVERS.values(), ids=SOLVERS)


@each_mode
@each_solver
def test_axes_are_those_of_torchs_svd_of_the_stacked_inputs(engine: Any, centred: bool) -> None:
    """To a sine of 1e-5, vector by vector; shares of the variance as a PCA gives them."""
    batches = [(normal(400, 48, seed=i) * SPREAD + 20).float() for i in range(3)]
    found, truth = stream(batches).axes(16, engine, centred), pca(stacked(batches, centred), 16)
    assert sine(found.v, truth.v) < 1e-5
    assert torch.allclose(found.s, truth.s, rtol=1e-6)
    assert torch.allclose(found.explained, truth.explained, rtol=1e-5)
    assert {part.dtype for part in found} == {torch.float64}
    assert (found.v.amax(1) == found.v.abs().amax(1)).all()
    assert torch.allclose(found.v @ found.v.T, torch.eye(16).double(), atol=1e-6)


@each_mode
def test_axes_of_inputs_like_a_language_models(centred: bool) -> None:
    """Singular values over 1e3; all of a span, as neighbours are close."""
    batches = [inputs(500, 64, seed=i).float() for i in range(4)]
    found, truth = stream(batches).axes(24, centred=centred), pca(stacked(batches, centred), 24)
    assert torch.linalg.matrix_norm(found.v - found.v @ truth.v.T @ truth.v, 2) < 1e-5
    assert torch.allclose(found.s, truth.s, rtol=1e-6)


@each_mode
def test_all_axes_explain_everything_and_none_nothing(centred: bool) -> None:
    made = stream([inputs(100, 8)])
    assert made.axes(8, centred=centred).explained.sum().item() == pytest.approx(1)
    assert [tuple(part.shape) for part in made.axes(0, centred=centred)] == [(0,), (0, 8), (0,)]


def orthonormal(found: Axes) -> bool:
    finite = all(torch.isfinite(part).all() for part in found)
    return finite and torch.allclose(found.v @ found.v.T, torch.eye(len(found.s)).double(), atol=1e-6)


@each_solver
def test_one_token_has_one_axis_and_no_variance(engine: Any) -> None:
    token = torch.tensor([3.0, 0.0, 4.0])
    found, centred = stream([token]).axes(3, engine), stream([token]).axes(3, engine, centred=True)
    assert torch.allclose(found.s, torch.tensor([5.0, 0.0, 0.0]).double(), atol=1e-6)
    assert torch.allclose(found.v[0], torch.tensor([0.6, 0.0, 0.8]).double())
    assert torch.allclose(found.explained, torch.tensor([1.0, 0.0, 0.0]).double(), atol=1e-12)
    assert torch.equal(torch.cat([centred.s, centred.explained]), torch.zeros(6).double())
    assert orthonormal(found)
    assert orthonormal(centred)


@each_solver
@pytest.mark.parametrize("value", [0.0, 0.1, -1e5])
def test_constant_inputs_have_no_variance_at_all(value: float, engine: Any) -> None:
    made = stream([torch.full((700, 5), value), torch.full((3, 5), value)])
    found = made.axes(5, engine, centred=True)
    assert torch.allclose(found.s, torch.zeros(5).double(), atol=abs(value) * 1e-12)
    assert orthonormal(found)
    assert orthonormal(made.axes(2, engine))
    assert made.axes(1, engine).explained.item() == pytest.approx(1 if value else 0)


def test_fewer_tokens_than_axes() -> None:
    x = normal(3, 7)
    found = stream([x]).axes(7)
    assert torch.allclose(found.s[:3], torch.linalg.svdvals(x))
    assert found.s[3:].max() < 1e-6
    assert orthonormal(found)


# Where a stream runs --------------------------------------------------------------------------------------------


def test_autocast_does_not_round_the_products() -> None:
    x = inputs(100, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        made = stream([x])
    assert same(made, stream([x]), 0.0)


class Watch(TorchFunctionMode):
    """The precision that float32 products have whenever one is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("matmul", "__matmul__", "mm"):
            self.seen += [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def legacy() -> None:
    torch.set_float32_matmul_precision("medium")


def modern() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@pytest.mark.usefixtures("precision")
@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"),
    reason="torch before 2.9 has not the switch that this turns",
)
@pytest.mark.parametrize("switch", [legacy, modern])
def test_tf32_is_off_for_the_products_and_as_it_was_after(switch: Callable[[], None]) -> None:
    switch()
    matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [part.fp32_precision for part in matmuls]
    assert "ieee" not in before
    x = inputs(20, 8).float()
    with Watch() as watch:
        made = stream([x])
    assert set(watch.seen) == {"ieee"}
    assert [part.fp32_precision for part in matmuls] == before
    made._join = lambda *_: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        made.update(x)
    assert [part.fp32_precision for part in matmuls] == before


def test_streams_started_in_inference_mode_go_on_outside() -> None:
    x = inputs(30, 6).float()
    shared = Shared()
    with torch.inference_mode():
        made = stream([x])
        for name in ("q", "k", "q", "k"):
            shared.update(name, x.clone())
    made.update(x)
    made.merge(stream([x]))
    shared.update("q", x)
    shared.update("k", 2 * x)
    assert same(made, stream([x, x, x]))
    assert same(shared["q"], stream([x, x, x]))
    assert same(shared["k"], stream([x, x, 2 * x]))


def test_no_graph_is_kept() -> None:
    x = inputs(30, 6).requires_grad_()
    made, shared = stream([x]), Shared()
    shared.update("q", x)
    for part in (made.mean, made.matrix(), made.axes(2).v, shared["q"].scatter):
        assert not part.requires_grad


# Sharing --------------------------------------------------------------------------------------------------------


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


X, M = normal(9, 4), torch.arange(9) < 5
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
        assert shared["k"].scatter.device.type == shared["k"].mean.device.type == (device or "cpu")


# Gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_mean_of_gradients_is_that_of_the_stack(dtype: torch.dtype) -> None:
    gradients = [normal(5, 7, seed=i, dtype=dtype) for i in range(170)]
    made, one, two = Mean(5, 7), Mean(5, 7), Mean(5, 7)
    for i, gradient in enumerate(gradients):
        made.update(gradient)
        (one if i < 60 else two).update(gradient)
    one.merge(two)
    truth = torch.stack(gradients).double().mean(0)
    for stream_ in (made, one):
        assert stream_.matrix().dtype == torch.float32
        assert stream_.count == 170
        assert error(stream_.matrix(), truth) < 1e-6


def test_a_first_step_is_what_the_optimiser_does() -> None:
    gradient = normal(6, 5, dtype=torch.float32)
    gradient[0, 0] = 0.0
    for kind, optimiser in (("sign", torch.optim.Adam), ("plain", torch.optim.SGD)):
        weight = torch.nn.Parameter(torch.zeros(6, 5))
        weight.grad = gradient.clone()
        optimiser([weight], lr=1.0).step()
        assert torch.allclose(first_step(gradient, kind), weight.detach(), atol=1e-5)  # type: ignore[arg-type]


# Nystrom --------------------------------------------------------------------------------------------------------


def nystrom(w: Tensor, k: int, rank: int) -> Tensor:
    """With the pseudo-inverse that keeps the `rank` largest triples, written out."""
    u, s, v = torch.linalg.svd(w[:k, :k].double())
    return w[:, :k].double() @ (v[:rank].T / s[:rank] @ u[:, :rank].T) @ w[:k].double()


@pytest.mark.parametrize("k", [1, 4, 9])
def test_slices_are_their_definition(k: int) -> None:
    w = normal(12, 9, dtype=torch.float32)
    value = slices(w, k)
    assert (value.left.shape, value.core.shape, value.right.shape) == ((12, k), (k, k), (k, 9))
    assert torch.equal(value.left, w[:, :k].double())
    assert torch.equal(value.right, w[:k].double())
    assert error(value.dense(), nystrom(w, k, k)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "k"), [(3, 3), (3, 8), (8, 20), (1, 20), (20, 20)])
def test_slices_are_the_weight_if_the_corner_has_its_rank(rank: int, k: int, dtype: torch.dtype) -> None:
    w = normal(40, rank, dtype=dtype) @ normal(rank, 30, seed=1, dtype=dtype)
    value = slices(w, k)
    assert error(value.dense(), w.double()) < (1e-4 if dtype == torch.float32 else 1e-11)
    assert torch.linalg.matrix_rank(value.core) == rank


def test_a_corner_s_rounding_is_not_inverted() -> None:
    """A float32 product of rank 3 has 17 triples of rounding: cut by default, noise of up to its inverse if not."""
    w = normal(40, 3, dtype=torch.float32) @ normal(3, 30, seed=1, dtype=torch.float32)
    assert slices(w, 20).core.norm() < 100
    assert slices(w, 20, rcond=0.0).core.norm() > 1e5


def test_rcond_says_what_counts_as_zero() -> None:
    w = torch.diag(torch.tensor([1.0, 0.1, 0.01]))
    assert torch.allclose(slices(w, 3, rcond=0.05).dense().diagonal(), torch.tensor([1.0, 0.1, 0.0]).double())
    assert (
        error(slices(normal(9, 9), 6, rcond=0.4).dense(), nystrom(normal(9, 9), 6, kept(normal(9, 9)[:6, :6], 0.4)))
        < 1e-11
    )


def kept(corner: Tensor, rcond: float) -> int:
    s = torch.linalg.svdvals(corner)
    return int((s > rcond * s[0]).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slices_of_16_bits_are_finite_and_float64(dtype: torch.dtype) -> None:
    w = normal(30, 20, dtype=dtype)
    value = slices(w, 20)
    rank = kept(w[:20].double(), 20**0.5 * torch.finfo(dtype).eps)
    assert {part.dtype for part in value} == {torch.float64}
    assert error(value.dense(), nystrom(w, 20, rank)) < 1e-10


def test_slices_do_not_hold_the_weight() -> None:
    w = normal(30, 20)
    before, value = w.clone(), slices(w, 3)
    for part in value:
        assert part.untyped_storage().nbytes() == part.numel() * 8
        part.zero_()
    assert torch.equal(w, before)


def test_slices_of_nothing_are_nothing() -> None:
    assert torch.equal(slices(torch.zeros(5, 4), 3).dense(), torch.zeros(5, 4).double())
    assert torch.equal(slices(normal(5, 4), 0).dense(), torch.zeros(5, 4).double())


# Errors ---------------------------------------------------------------------------------------------------------

W, C, NAN = normal(5, 4), covariance(4), torch.full((5, 4), torch.nan)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "NaN weight": (lambda: oriented(NAN, C, 2, "top", exact), "`w` has to be finite. Found 20 NaN or infinite entries"),
    "NaN covariance": (lambda: oriented(W, NAN[:4], 2, "top", exact), "`c` has to be finite. Found 16 NaN"),
    "another width": (lambda: oriented(W, C[:3, :3], 2, "top", exact), "`c` has to be of shape (4, 4). Found (3, 3)"),
    "wide covariance": (lambda: oriented(W, W, 2, "top", exact), "`c` has to be of shape (4, 4). Found (5, 4)"),
    "rank": (lambda: oriented(W, C, 5, "bottom", exact), "0 <= k <= min(5, 4) = 4. Found 5"),
    "meta": (lambda: oriented(W.to("meta"), C, 2, "top", exact), "Found torch.float64 (5, 4) on the meta device"),
    "end": (lambda: oriented(W, C, 2, "middle", Engine()), "`end` has to be 'top' or 'bottom'"),  # type: ignore[arg-type]
    "not square": (lambda: damped(W), "`c` has to be of shape (4, 4). Found (5, 4)"),
    "share": (lambda: damped(C, -0.1), "`share` has to be a finite number of at least 0. Found -0.1"),
    "NaN share": (lambda: damped(C, math.nan), "Found nan"),
    "a number": (lambda: damped(C[0, 0]), "has to be a matrix of floating point. Found torch.float64 ()"),
    "no features": (lambda: Covariance(0), "`features` has to be at least 1. Found 0"),
    "no inputs": (lambda: Covariance(3).matrix(), "A covariance needs inputs. Found none"),
    "no axes": (lambda: Covariance(3).axes(1), "A covariance needs inputs. Found none"),
    "axes": (lambda: stream([W]).axes(5), "0 <= k <= n = 4. Found 5"),
    "negative axes": (lambda: stream([W]).axes(-1), "0 <= k <= n = 4. Found -1"),
    "inputs": (
        lambda: stream([W]).update(C[:, :3]),
        "floating point of shape (..., 4). Found torch.float64 of shape (4, 3)",
    ),
    "whole inputs": (lambda: stream([W]).update(C.long()), "Found torch.int64 of shape (4, 4)"),
    "meta inputs": (lambda: stream([W]).update(C.to("meta")), "of shape (4, 4) on the meta device"),
    "NaN inputs": (
        lambda: stream([W]).update(NAN),
        "Inputs have to be finite. Found 20 NaN or infinite entries in (5, 4)",
    ),
    "whole mask": (lambda: stream([W]).update(W, torch.ones(5).long()), "boolean of shape (5,). Found torch.int64"),
    "short mask": (
        lambda: stream([W]).update(W, torch.ones(4) > 0),
        "boolean of shape (5,). Found torch.bool of shape (4,)",
    ),
    "no weight": (lambda: stream([W]).update(W, weight=0), "`weight` has to be a finite number above 0. Found 0"),
    "NaN weights": (lambda: stream([W]).update(W, weight=math.nan), "above 0. Found nan"),
    "merge": (lambda: Covariance(3).merge(Covariance(4)), "Streams to merge need the same size. Found 3 and 4"),
    "no gradients": (lambda: Mean(5, 4).matrix(), "A mean needs gradients. Found none"),
    "gradient": (lambda: Mean(4, 5).update(W), "`gradient` has to be of shape (4, 5). Found (5, 4)"),
    "NaN gradient": (lambda: Mean(5, 4).update(NAN), "`gradient` has to be finite. Found 20 NaN"),
    "merge gradients": (lambda: Mean(5, 4).merge(Mean(4, 5)), "`other` has to be of shape (5, 4). Found (4, 5)"),
    "kind": (lambda: first_step(W, "adam"), "`kind` has to be 'sign' or 'plain'. Found 'adam'"),  # type: ignore[arg-type]
    "NaN step": (lambda: first_step(NAN, "sign"), "`gradient` has to be finite"),
    "slices": (lambda: slices(W, 5), "0 <= k <= min(5, 4) = 4. Found 5"),
    "rcond": (lambda: slices(W, 2, rcond=1.0), "`rcond` has to be 0 <= rcond < 1. Found 1.0"),
    "NaN slices": (lambda: slices(NAN, 2), "`w` has to be finite"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_errors_give_the_rule_and_what_was_found(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_gradient_that_raises_leaves_no_trace() -> None:
    made = Mean(5, 4)
    made.update(W)
    with pytest.raises(ValueError, match="has to be finite"):
        made.update(NAN)
    assert made.count == 1
    assert torch.equal(made.matrix(), W.float())
