"""Oriented cuts, gradients and slices against their dense definitions, written plainly in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spectra import LOW, by_gram, covariance, error, exact, noise, normal, weight
from torch import Tensor

from peft_kasa.spectral import Engine
from peft_kasa.spectral.sources import Mean, damped, first_step, oriented, slices

ENDS = ["top", "bottom"]
each_end = pytest.mark.parametrize("end", ENDS)


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
