"""Covariance streams and their axes against the stacked inputs, in float64."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from spectra import X, covariance, error, exact, inputs, noise, normal, same, stream
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peft_kasa.spectral import Engine
from peft_kasa.spectral.covariance import Axes, Covariance
from peft_kasa.spectral.shared import Shared

each_mode = pytest.mark.parametrize("centred", [False, True], ids=["as it is", "centred"])


def stacked(batches: list[Tensor], centred: bool) -> Tensor:
    x = torch.cat([batch.double().reshape(-1, batch.shape[-1]) for batch in batches])
    return x - x.mean(0) if centred else x


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
    for part in (made.mean, made.matrix(), made.axes(2).v, shared["q"].triangle.dense()):
        assert not part.requires_grad


# Errors ---------------------------------------------------------------------------------------------------------

W, C, NAN = normal(5, 4), covariance(4), torch.full((5, 4), torch.nan)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
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
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_errors_give_the_rule_and_what_was_found(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
