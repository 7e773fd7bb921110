"""The algebra of low-rank values and cuts, and of the slots that hold them, over shapes, ranks and kinds of core."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

from peft_kasa import PiSSAConfig, SORSAConfig, SpectralLinear, Start, SVFitConfig
from peft_kasa.adapter import slots as slot
from peft_kasa.spectral import Engine, LowRank, Spectrum

quick = settings(deadline=None, max_examples=40, derandomize=True)

CONFIG = SORSAConfig()  # any whose core is what learns
TRAINS = [train for count in (1, 2, 3) for train in combinations(slot.LEARNABLE, count)]
each_train = pytest.mark.parametrize("train", TRAINS, ids="+".join)

seeds = st.integers(0, 1000)
sizes = st.integers(1, 7)
factors = st.floats(-3, 3).filter(lambda factor: abs(factor) > 1e-3)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lowrank(m: int, k: int, n: int, full: bool, seed: int, dtype: torch.dtype = torch.float64) -> LowRank:
    core = normal(*((k, k) if full else (k,)), seed=seed + 1, dtype=dtype)
    return LowRank(normal(m, k, seed=seed, dtype=dtype), core, normal(k, n, seed=seed + 2, dtype=dtype))


def matrix(value: LowRank) -> Tensor:
    """left @ core @ right as it is defined, in float64."""
    left, core, right = (part.double() for part in value)
    return left @ (torch.diag(core) if core.ndim == 1 else core) @ right


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((found.double() - expected.double()).norm() <= tolerance * (1 + expected.double().norm()))


lowranks = st.builds(lowrank, m=sizes, k=sizes, n=sizes, full=st.booleans(), seed=seeds)

# LowRank --------------------------------------------------------------------------------------------------------


@quick
@given(lowranks, st.lists(st.integers(1, 3), max_size=3))
def test_applying_is_the_product_with_the_matrix(value: LowRank, batch: list[int]) -> None:
    x = normal(*batch, value.right.shape[1], seed=9)
    assert value(x).shape == (*batch, value.left.shape[0])
    assert close(value(x), x @ matrix(value).T)


@quick
@given(lowranks)
def test_dense_is_left_core_right(value: LowRank) -> None:
    assert value.dense().shape == (value.left.shape[0], value.right.shape[1])
    assert close(value.dense(), matrix(value))


@quick
@given(lowranks, factors)
def test_scaled_is_the_matrix_times_the_number(value: LowRank, factor: float) -> None:
    assert close(value.scaled(factor).dense(), factor * matrix(value))
    assert value.scaled(factor).rank == value.rank


@quick
@given(lowranks)
def test_factors_multiply_to_the_matrix(value: LowRank) -> None:
    b, a = value.factors()
    assert b.shape == (value.left.shape[0], value.rank)
    assert a.shape == (value.rank, value.right.shape[1])
    assert close(b @ a, matrix(value))


@quick
@given(sizes, sizes, sizes, sizes, st.booleans(), st.booleans(), seeds)
def test_subtraction_is_exact_and_ranks_add(
    m: int, n: int, k: int, other_k: int, full: bool, other_full: bool, seed: int
) -> None:
    value, other = lowrank(m, k, n, full, seed), lowrank(m, other_k, n, other_full, seed + 10)
    difference = value - other
    assert close(difference.dense(), matrix(value) - matrix(other))
    assert difference.rank == k + other_k


@quick
@given(lowranks, st.booleans(), seeds)
def test_subtraction_keeps_the_rank_where_right_is_shared(value: LowRank, full: bool, seed: int) -> None:
    m, k = value.left.shape
    other = lowrank(m, k, 1, full, seed)._replace(right=value.right)
    assert (value - other).rank == k
    assert close((value - other).dense(), matrix(value) - matrix(other))


@quick
@given(lowranks)
def test_a_copy_of_right_is_not_taken_for_the_same(value: LowRank) -> None:
    other = value._replace(right=value.right.clone())
    assert (value - other).rank == 2 * value.rank
    assert close((value - other).dense(), torch.zeros_like(value.dense()))


@quick
@given(lowranks)
def test_a_value_minus_itself_is_exactly_zero(value: LowRank) -> None:
    assert not (value - value).dense().any()


@quick
@given(lowranks, st.integers(1, 9))
def test_truncated_is_the_best_of_its_rank_and_tells_its_error(value: LowRank, rank: int) -> None:
    """Eckart-Young: the error of any matrix of that rank is at least the norm of the tail."""
    kept, error = value.truncated(rank)
    whole = matrix(value)
    tail = torch.linalg.svdvals(whole)[rank:].norm()
    assert kept.rank <= rank
    assert close((whole - kept.dense()).norm(), tail, 1e-10)
    assert error == pytest.approx((tail / whole.norm()).item(), abs=1e-10)


@quick
@given(lowranks)
def test_truncated_at_its_own_rank_is_itself(value: LowRank) -> None:
    kept, error = value.truncated(value.rank)
    assert error == 0.0
    assert close(kept.dense(), matrix(value), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_truncated_keeps_the_dtype(dtype: torch.dtype) -> None:
    kept, _ = lowrank(5, 3, 4, False, 0, dtype).truncated(2)
    assert {part.dtype for part in kept} == {dtype}


def test_truncating_zero_has_no_error() -> None:
    kept, error = lowrank(5, 3, 4, False, 0).scaled(0.0).truncated(2)
    assert error == 0.0
    assert not kept.dense().any()


# Spectrum -------------------------------------------------------------------------------------------------------


def spectrum(m: int, n: int, share: float, seed: int, end: Any) -> Spectrum:
    """A cut of a random matrix with k from 0 to min(m, n), in float64."""
    k = round(share * min(m, n))
    return Spectrum(*(part.double() for part in Engine()(normal(m, n, seed=seed), k, end)))


spectra = st.builds(
    spectrum, m=sizes, n=sizes, share=st.floats(0, 1), seed=seeds, end=st.sampled_from(["top", "bottom"])
)


def product(cut: Spectrum) -> Tensor:
    return cut.u @ torch.diag(cut.s) @ cut.v


@quick
@given(spectra)
def test_balanced_and_split_are_the_same_matrix(cut: Spectrum) -> None:
    assert close(cut.split().dense(), product(cut))
    assert close(cut.balanced().dense(), product(cut))


@quick
@given(spectra)
def test_balanced_gives_both_sides_the_same_weight(cut: Spectrum) -> None:
    value = cut.balanced()
    assert close(value.left.norm(dim=0), cut.s.sqrt(), 1e-6)
    assert close(value.right.norm(dim=1), cut.s.sqrt(), 1e-6)
    assert torch.equal(value.core, torch.ones_like(cut.s))


@quick
@given(spectra, st.floats(0.01, 3))
def test_scaling_a_cut_scales_its_matrix(cut: Spectrum, factor: float) -> None:
    for value in (cut.scaled(factor).split(), cut.scaled(factor).balanced()):
        assert close(value.dense(), factor * product(cut))


@quick
@given(spectra, seeds)
def test_signs_are_canonical_whatever_they_were(cut: Spectrum, seed: int) -> None:
    sign = normal(len(cut.s), seed=seed).sign()
    signed = Spectrum(cut.u * sign, cut.s, cut.v * sign[:, None]).signed()
    assert close(product(signed), product(cut))
    if len(cut.s):
        pivots = signed.u.gather(0, signed.u.abs().argmax(0, keepdim=True))
        assert (pivots > 0).all()
    assert all(torch.equal(a, b) for a, b in zip(signed.signed(), signed, strict=True))


@quick
@given(spectra, seeds)
def test_canonical_signs_undo_a_change_of_signs(cut: Spectrum, seed: int) -> None:
    sign = normal(len(cut.s), seed=seed).sign()
    changed = Spectrum(cut.u * sign, cut.s, cut.v * sign[:, None])
    assert all(torch.equal(a, b) for a, b in zip(changed.signed(), cut.signed(), strict=True))


# Slots ----------------------------------------------------------------------------------------------------------


def moved(start: Start, size: float, seed: int) -> tuple[dict[str, Tensor], LowRank]:
    """Slots of a start whose differences are noise, and what they then stand for, in float64."""
    slots = slot.pack(start)
    values = {name: part.double() for name, part in start.trained._asdict().items()}
    for name in start.train:
        slots[name] = size * normal(*slots[name].shape, seed=seed, dtype=torch.float32)
        values[name] = values[name] + slots[name].double()
    return slots, LowRank(**values)


@each_train
@quick
@given(sizes, sizes, sizes, st.booleans(), factors, seeds)
def test_update_is_the_difference_from_the_start(
    train: Any, m: int, k: int, n: int, full: bool, scale: float, seed: int
) -> None:
    trained = lowrank(m, k, n, full, seed, torch.float32)
    slots, now = moved(Start(trained, train, "start"), 0.3, seed + 20)
    up, down = slot.update(slots, CONFIG, scale).folded()
    assert close(up.double() @ down.double(), scale * (matrix(now) - matrix(trained)), 1e-5)
    assert close(slot.value(slots, CONFIG).dense(), matrix(now), 1e-5)


@each_train
@quick
@given(sizes, sizes, sizes, st.booleans(), factors, seeds)
def test_update_is_exactly_zero_at_the_start(
    train: Any, m: int, k: int, n: int, full: bool, scale: float, seed: int
) -> None:
    trained = lowrank(m, k, n, full, seed, torch.float32)
    up, down = slot.update(slot.pack(Start(trained, train, "start")), CONFIG, scale).folded()
    assert not (up @ down).any()
    assert not nn.functional.linear(nn.functional.linear(normal(3, n).float(), down), up).any()


@each_train
@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_update_has_the_rank_of_one_frame_or_two(train: Any, full: bool) -> None:
    """k where either frame is frozen and nothing else moves beside it, else 2k; of the matrix, k if either is."""
    slots, _ = moved(Start(lowrank(12, 3, 10, full, 0, torch.float32), train, "start"), 0.3, 20)
    up, down = slot.update(slots, CONFIG, 2.0).folded()
    assert up.shape[1] == down.shape[0] == (6 if "right" in train and len(train) > 1 else 3)
    rank = torch.linalg.matrix_rank(up.double() @ down.double(), rtol=1e-5)
    assert rank == (6 if {"left", "right"} <= set(train) else 3)


@each_train
def test_a_small_update_keeps_its_digits(train: Any) -> None:
    """In float32 already: B - B0 would lose those that a step of 1e-6 does not share with a start of 1."""
    trained = lowrank(40, 4, 30, False, 0, torch.float32)
    slots, now = moved(Start(trained, train, "start"), 1e-6, 20)
    up, down = slot.update(slots, CONFIG, 1.0).folded()
    assert close(1e6 * up.double() @ down.double(), 1e6 * (matrix(now) - matrix(trained)), 1e-5)


@each_train
@pytest.mark.parametrize("cut", [False, True], ids=["nothing leaves", "a cut leaves"])
def test_update_is_the_value_where_the_start_does_not_leave(train: Any, cut: bool) -> None:
    """KaSA's shape of start: a cut is kept beside the update, not in it."""
    trained, displaced = lowrank(6, 3, 5, False, 0, torch.float32), lowrank(6, 2, 5, False, 5, torch.float32)
    slots = slot.pack(Start(trained, train, displaced if cut else None))
    up, down = slot.update(slots, CONFIG, 1.5).folded()
    assert close(up @ down, 1.5 * matrix(trained), 1e-6)
    assert up.shape[1] == 3
    factors = slot.cut(slots)
    assert (factors is not None) == cut
    assert factors is None or close(factors.up @ factors.down, matrix(displaced), 1e-6)


@quick
@given(sizes, sizes, st.lists(st.tuples(sizes, seeds), min_size=1, max_size=3))
def test_joined_factors_are_the_sum(m: int, n: int, ranks: list[tuple[int, int]]) -> None:
    parts = [lowrank(m, k, n, False, seed).factors() for k, seed in ranks]
    up, down = slot.join([slot.Product(b, None, a) for b, a in parts]).folded()
    assert up.shape[1] == sum(k for k, _ in ranks)
    assert close(up @ down, sum((b @ a for b, a in parts), torch.zeros(m, n)))


# In bfloat16 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decaying() -> Tensor:
    """A weight of the shape of SmolLM2's gate_proj whose spectrum falls, as trained ones do, stored in bfloat16."""
    profile = 1 / (1 + torch.arange(1536) / 20)
    return (normal(576, 1536, dtype=torch.float32) * profile).to(torch.bfloat16)


@torch.no_grad()
def trained_layer(weight: Tensor, config: Any, size: float) -> SpectralLinear:
    """A layer on that weight whose differences are noise of that size; its base then gives zero, not to hide them."""
    base = nn.Sequential(nn.Linear(1536, 576, bias=False, dtype=torch.bfloat16))
    base[0].weight.copy_(weight)
    layer = get_peft_model(base, config).base_model.model[0]
    for seed, part in enumerate(layer.slots("default").values()):
        if part.requires_grad:
            part.copy_(size * normal(*part.shape, seed=seed))
    base[0].weight.zero_()
    return layer


@pytest.mark.parametrize("config_class", [SORSAConfig, PiSSAConfig, SVFitConfig])
@torch.no_grad()
def test_a_small_update_survives_bfloat16(config_class: Any, decaying: Tensor) -> None:
    """Updates of 1e-4: within 1 % as the layer computes them, lost (above 10 %) as bfloat16 B less bfloat16 B0."""
    slots = (layer := trained_layer(decaying, config_class(r=16, target_modules=["0"]), 1e-4)).slots("default")
    start = LowRank(*(slots[f"{name}0"].double() for name in slot.LEARNABLE))
    now = LowRank(*(part + slots.get(name, torch.zeros(())) for name, part in start._asdict().items()))
    x = normal(16, 1536).to(torch.bfloat16)
    exact = x.double() @ (matrix(now) - matrix(start)).T

    def naive(value: LowRank) -> Tensor:
        b, a = (factor.to(torch.bfloat16) for factor in value.factors())
        return nn.functional.linear(nn.functional.linear(x, a), b).double()

    assert (layer(x).double() - exact).norm() <= 1e-2 * exact.norm()
    assert (naive(now) - naive(start) - exact).norm() > 1e-1 * exact.norm()
