"""Weighted combinations of adapters: the sum of the updates, as an adapter like any other."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from bases import load, logits, move, stack, steps
from members import MEMBERS, VARIANTS, Member
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_kasa import CorDAConfig, SpectralLinear, export_lora

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)
kasa, pissa, svf = (next(member for member in MEMBERS if member.name == name) for name in ("kasa", "pissa", "svf"))
CORES = [member for member in [*MEMBERS, *VARIANTS] if member.learns == ("core",)]
WEIGHTS = [0.7, -0.4]


def layers(model: nn.Module) -> list[SpectralLinear]:
    return [module for module in model.modules() if isinstance(module, SpectralLinear)]


def sources(base: nn.Module, *members: Member, **given: object) -> PeftModel:
    """An adapter of each member on one base, called m0, m1, ..., all of them moved."""
    model = get_peft_model(base, members[0].config(**given), adapter_name="m0")
    for index, member in enumerate(members[1:], 1):
        model.add_adapter(f"m{index}", member.config(**given))
    for index in range(len(members)):
        model.set_adapter(f"m{index}")
        move(model, 0.1, seed=index)
    return model.eval()


def wanted(layer: SpectralLinear, weights: list[float]) -> torch.Tensor:
    """The weighted sum of the updates, in float64."""
    return sum(
        (weight * layer.get_delta_weight(f"m{index}").detach().double() for index, weight in enumerate(weights)),
        torch.zeros(()),
    )


def off(layer: SpectralLinear, adapter: str, weights: list[float]) -> float:
    """The relative error of the adapter's update."""
    expected = wanted(layer, weights)
    return ((layer.get_delta_weight(adapter).double() - expected).norm() / expected.norm()).item()


# The sum --------------------------------------------------------------------------------------------------------


@each_member
@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_cat_and_linear_are_the_weighted_sum(member: Member, kind: str, tiny: str) -> None:
    model = sources(load(tiny), member, member)
    errors = model.add_weighted_adapter(["m0", "m1"], WEIGHTS, "both", combination_type=kind)
    assert set(errors.values()) == {0.0}
    assert errors.keys() == {layer.name for layer in layers(model)}
    assert max(off(layer, "both", WEIGHTS) for layer in layers(model)) < 1e-6


@each_member
def test_svd_is_the_best_of_its_rank_and_says_what_it_lost(member: Member, tiny: str) -> None:
    model = sources(load(tiny), member, pissa)
    errors = model.add_weighted_adapter(["m0", "m1"], WEIGHTS, "both", svd_rank=3)
    for layer in layers(model):
        s = torch.linalg.svdvals(wanted(layer, WEIGHTS))
        best = (s[3:].norm() / s.norm()).item()
        assert layer.adapters["both"].rank == 3
        assert off(layer, "both", WEIGHTS) == pytest.approx(best, rel=1e-4)
        assert errors[layer.name] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
def test_all_members_are_summed_on_every_base(kind: str, tiny: str) -> None:
    model = sources(load(tiny, kind), *MEMBERS)
    weights = [0.1 * index - 0.5 for index in range(len(MEMBERS))]
    model.add_weighted_adapter([f"m{index}" for index in range(len(MEMBERS))], weights, "all", combination_type="cat")
    assert max(off(layer, "all", weights) for layer in layers(model)) < 1e-5


@each_member
def test_one_adapter_of_weight_one_is_copied(member: Member, tiny: str) -> None:
    model = sources(load(tiny), member)
    expected = logits(model)
    assert set(model.add_weighted_adapter(["m0"], [1.0], "copy").values()) == {0.0}
    model.set_adapter("copy")
    assert (logits(model) - expected).norm() < 1e-5 * expected.norm()


# Ranks and cuts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", CORES, ids=str)
def test_the_rank_stays_where_cores_alone_learn_from_one_start(member: Member, tiny: str) -> None:
    model = sources(load(tiny), member, member, target_modules=["q_proj"], r=4)
    model.add_weighted_adapter(["m0", "m1"], WEIGHTS, "both", combination_type="linear")
    assert {layer.adapters["both"].rank for layer in layers(model)} == {4}


def test_ranks_add_up_but_for_what_leaves_for_both(tiny: str) -> None:
    """Two of KaSA: 4 + 4 learnt, one cut of 6; two of PiSSA: 4 + 4 learnt, one start."""
    for member, given, rank in ((kasa, {"truncation": 6}, 14), (pissa, {}, 12)):
        model = sources(load(tiny), member, member, target_modules=["up_proj"], **given)
        model.add_weighted_adapter(["m0", "m1"], [0.5, 0.5], "both", combination_type="cat")
        assert {layer.adapters["both"].rank for layer in layers(model)} == {rank}


def test_no_rank_is_above_the_weights(tiny: str) -> None:
    model = sources(load(tiny), pissa, pissa, pissa, r=12, target_modules=["k_proj", "up_proj"])
    weights = [1.0, 2.0, 3.0]
    model.add_weighted_adapter(["m0", "m1", "m2"], weights, "all", combination_type="cat")
    ranks = {layer.name.rpartition(".")[2]: layer.adapters["all"].rank for layer in layers(model)}
    assert ranks == {"k_proj": 32, "up_proj": 48}
    assert max(off(layer, "all", weights) for layer in layers(model)) < 1e-6


def test_a_cut_leaves_once_where_weights_add_up_to_one(tiny: str) -> None:
    model = get_peft_model(load(tiny), kasa.config(), adapter_name="m0")
    model.add_adapter("m1", kasa.config(seed=5))
    cut = logits(model)  # left is zero at the start: only the cut acts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_weighted_adapter(["m0", "m1"], [0.25, 0.75], "mean")
    model.set_adapter("mean")
    assert (logits(model) - cut).norm() < 1e-5 * cut.norm()
    with pytest.warns(UserWarning, match=r"\['m0', 'm1'\] take out leave 2 times.*weights of the sum 1"):
        model.add_weighted_adapter(["m0", "m1"], [1, 1], "sum")
    assert max(off(layer, "sum", [1, 1]) for layer in layers(model)) < 1e-5


# Modules ---------------------------------------------------------------------------------------------------------


def test_adapters_of_different_modules_and_ranks(tiny: str) -> None:
    model = get_peft_model(load(tiny), kasa.config(target_modules=["q_proj"]), adapter_name="m0")
    model.add_adapter("m1", svf.config(target_modules=r".*layers\.1.*(q|up)_proj", r=None))
    for name in ("m0", "m1"):
        model.set_adapter(name)
        move(model, 0.1)
    model.add_weighted_adapter(["m0", "m1"], WEIGHTS, "both", combination_type="cat")
    for layer in layers(model):
        held = [(int(name[1]), WEIGHTS[int(name[1])]) for name in ("m0", "m1") if name in layer.adapters]
        expected = sum(weight * layer.get_delta_weight(f"m{index}") for index, weight in held)
        assert torch.allclose(layer.get_delta_weight("both"), expected, atol=1e-5)
    assert {layer.name for layer in layers(model) if "both" in layer.adapters} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_conv1d() -> None:
    model = sources(nn.Sequential(Conv1D(12, 24)), kasa, pissa, target_modules=["0"])
    model.add_weighted_adapter(["m0", "m1"], WEIGHTS, "both", combination_type="cat")
    assert off(layers(model)[0], "both", WEIGHTS) < 1e-6


# The result is an adapter -----------------------------------------------------------------------------------------


@each_member
def test_the_result_outlives_its_sources(member: Member, tiny: str, tmp_path: Path) -> None:
    model = sources(load(tiny), member, kasa)
    active = logits(model)
    model.add_weighted_adapter(["m0", "m1"], WEIGHTS, "both", combination_type="svd", svd_rank=8)
    assert model.active_adapters == ["m1"]
    assert torch.equal(logits(model), active)
    model.set_adapter("both")
    expected = logits(model)
    for name in ("m0", "m1"):
        model.delete_adapter(name)
    assert torch.equal(logits(model), expected)

    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(load(tiny), str(tmp_path / "both"))
    assert torch.equal(logits(again), expected)
    export_lora(model, tmp_path / "lora", adapter="both")
    lora = PeftModel.from_pretrained(load(tiny), str(tmp_path / "lora"))
    assert (logits(lora) - expected).norm() < 1e-5 * expected.norm()
    assert (logits(again.merge_and_unload()) - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(logits(model.unload()), logits(load(tiny)))


@each_member
def test_the_result_trains_on(member: Member, tiny: str) -> None:
    model = sources(load(tiny), member, pissa)
    model.add_weighted_adapter(["m0", "m1"], WEIGHTS, "both")
    before = [layer.get_delta_weight("m0").detach().clone() for layer in layers(model)]
    model.set_adapter("both")
    start = logits(model)
    assert all(torch.isfinite(torch.tensor(steps(model))))
    assert not torch.equal(logits(model), start)
    assert all(torch.equal(layer.get_delta_weight("m0"), old) for layer, old in zip(layers(model), before, strict=True))


@each_member
def test_a_combination_made_while_merged_is_the_same(member: Member, tiny: str) -> None:
    model = sources(load(tiny), member, pissa)
    model.merge_adapter()
    model.add_weighted_adapter(["m0", "m1"], WEIGHTS, "both", combination_type="cat")
    model.unmerge_adapter()
    assert max(off(layer, "both", WEIGHTS) for layer in layers(model)) < 1e-6


# What is refused --------------------------------------------------------------------------------------------------


BAD = [
    (([], [], "x"), {}, r"adapters has to name at least one of \['late', 'm0', 'm1'\]"),
    ((["m0", "m7"], [1, 1], "x"), {}, r"adapters have to be of .*Found \['m7'\]"),
    ((["m0", "m1"], [1.0], "x"), {}, r"weights has to have 2 entries, one an adapter. Found 1"),
    ((["m0"], [float("nan")], "x"), {}, r"weights have to be finite numbers"),
    ((["m0"], [1.0], "m1"), {}, r"adapter_name has to be a new one.*Found 'm1'"),
    ((["m0"], [1.0], "left"), {}, r"An adapter's name may not be"),
    ((["m0"], [1.0], "x"), {"combination_type": "ties"}, r"combination_type has to be 'cat' or.*Found 'ties'"),
    ((["m0"], [1.0], "x"), {"combination_type": "ties", "density": 0.2}, r"combination_type has to be 'cat' or"),
    (
        (["m0"], [1.0], "x"),
        {"density": 0.2},
        r"density is of LoRA's kinds of combination, which are not here: leave it out. Found 0.2",
    ),
    ((["m0"], [1.0], "x"), {"svd_driver": "gesvd"}, r"svd_driver is of LoRA's kinds of combination"),
    ((["m0"], [1.0], "x"), {"svd_rank": 0}, r"svd_rank has to be a whole number of at least 1. Found 0"),
    ((["m0"], [1.0], "x"), {"combination_type": "cat", "svd_rank": 4}, r"svd_rank is for combination_type='svd'"),
    ((["m0", "late"], [1, 1], "x"), {}, r"'late'.*Call calibrate"),
]


def test_an_argument_that_loras_has_not_either_is_a_type_error() -> None:
    model = sources(stack(), kasa, target_modules=["0"])
    with pytest.raises(TypeError, match=r"no argument 'svd_ranks'\. Did you mean 'svd_rank'"):
        model.add_weighted_adapter(["m0"], [1.0], "x", svd_ranks=2)


@pytest.mark.parametrize(("given", "options", "said"), BAD, ids=lambda value: str(value)[:30])
def test_bad_arguments_are_refused(given: tuple[object, ...], options: dict[str, object], said: str) -> None:
    model = sources(stack(), kasa, pissa, target_modules=["0", "2"])
    model.add_adapter("late", CorDAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=said):
        model.add_weighted_adapter(*given, **options)
    assert list(model.peft_config) == ["m0", "m1", "late"]
    assert not any("x" in layer.adapters for layer in layers(model))


@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
def test_what_does_not_add_up_is_refused(extra: dict[str, object], tiny: str) -> None:
    model = get_peft_model(load(tiny), kasa.config(**extra), adapter_name="m0")
    with pytest.raises(
        ValueError, match=r"adapter 'm0' also trains modules in full, tokens or biases.*without modules_to_save"
    ):
        model.add_weighted_adapter(["m0"], [1.0], "x")
