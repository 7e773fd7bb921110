"""`requantize`: the residual base in 4 bits, for every member whose start leaves the base."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import fresh, learning, load, logits, move, steps
from members import Member
from peft import get_peft_model
from residual import ABLE, ONCE, PISSA, UNABLE, bits, layers, requantized, same, times
from torch import nn

from peft_kasa import KaSAConfig, PiSSAConfig, requantize, save_requantized
from peft_kasa.adapter.base.base_weight import BaseWeight

bnb = pytest.importorskip("bitsandbytes")
nf4 = bnb.functional

each_able = pytest.mark.parametrize("member", ABLE, ids=str)


# The numbers ----------------------------------------------------------------------------------------------------


def one_layer(kind: str, double: bool, weight: torch.Tensor) -> Any:
    m, n = weight.shape
    base = bnb.nn.Linear4bit(n, m, bias=False, quant_type=kind, compress_statistics=double)
    base.load_state_dict({"weight": weight})
    return nn.Sequential(base).to("cpu")


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_the_base_is_that_of_the_papers_loop(iterations: int, kind: str, double: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 128) @ torch.diag(torch.linspace(3, 0.1, 128))
    rest = weight
    for _ in range(iterations):
        u, s, v = torch.linalg.svd(rest, full_matrices=False)
        taken = u[:, :8] * s[:8] @ v[:8]
        base = nf4.dequantize_4bit(*nf4.quantize_4bit(weight - taken, compress_statistics=double, quant_type=kind))
        rest = weight - base
    model = get_peft_model(one_layer(kind, double, weight), PiSSAConfig(r=8, target_modules=["0"]))
    report = requantize(model, {"0.weight": weight}, iterations=iterations)
    [layer] = layers(model)
    assert (layer.base.four_bits().matrix() - base).norm() <= 2e-3 * base.norm()  # an entry may fall to a neighbour
    assert (layer.base.matrix() - base - taken).norm() <= 2e-3 * weight.norm()
    assert report.after == pytest.approx(((rest - taken).norm() / weight.norm()).item(), rel=1e-3)


@each_able
def test_the_report_is_what_the_weights_show_and_less_than_without(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny, "nf4"), member.config(r=8))
    plain = {layer.name: layer.base.matrix() for layer in layers(model)}
    report = requantize(model, tiny, iterations=times(member))
    true = {name: module.weight for name, module in load(tiny).named_modules() if name in plain}
    for layer in layers(model):
        weight, found = true[layer.name], report.modules[layer.name]
        expected = [weight.norm(), (weight - plain[layer.name]).norm(), (weight - layer.base.matrix()).norm()]
        assert list(found) == pytest.approx([value.item() for value in expected], rel=1e-4)
    assert report.after < report.before
    assert report.gain == pytest.approx(1 - report.after / report.before)
    assert f"{report.after:.2%} after" in str(report)


def test_iterations_lessen_the_error(tiny: str) -> None:
    after = []
    for iterations in (1, 5):
        model = get_peft_model(load(tiny, "nf4"), PISSA.config(r=8))
        after.append(requantize(model, tiny, iterations=iterations).after)
    assert after[1] < 0.98 * after[0]


def test_a_folder_a_state_dict_and_a_model_are_read_alike(tiny: str) -> None:
    found = []
    for weights in (tiny, Path(tiny), fresh().state_dict(), fresh()):
        model = get_peft_model(load(tiny, "nf4"), PISSA.config(r=8))
        requantize(model, weights, iterations=2)
        found.append(list(bits(model)))
    assert all(same(found[0], other) for other in found[1:])


# The model ------------------------------------------------------------------------------------------------------


@each_able
def test_the_adapter_acts_on_the_residual_in_four_bits(member: Member, tiny: str) -> None:
    """The layer is Q x + s L C R x, whatever has been learnt; without the adapter it is Q x + the start."""
    model = requantized(member, tiny)
    expected = logits(model)
    with model.disable_adapter():
        assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()
    move(model)
    for layer in layers(model):
        whole = layer.base.four_bits().matrix() + layer.value("default").dense() * layer.adapters["default"].scale
        assert (layer.base.matrix() + layer.lowrank("default").dense() - whole).norm() <= 1e-5 * whole.norm()
        x = torch.randn(3, layer.in_features)
        bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias
        assert (layer.train()(x) - x @ whole.T - bias).norm() <= 1e-5 * (x @ whole.T).norm()


def test_outputs_are_closer_to_the_float_model(tiny: str) -> None:
    expected = logits(load(tiny))
    before = (logits(load(tiny, "nf4")) - expected).norm()
    model = get_peft_model(load(tiny, "nf4"), PISSA.config(r=32))
    requantize(model, tiny)
    assert (logits(model) - expected).norm() < 0.7 * before


def test_the_default_is_the_base_as_it_was(tiny: str) -> None:
    base = load(tiny, "nf4")
    expected = logits(base)
    assert torch.equal(logits(get_peft_model(base, PISSA.config())), expected)


@each_able
def test_unloading_gives_the_first_model_back(member: Member, tiny: str) -> None:
    plain = get_peft_model(load(tiny, "nf4"), member.config(r=8))
    expected, held = logits(plain), [value.clone() for value in bits(plain)]
    assert not same(bits(requantized(member, tiny)), held)
    model = requantized(member, tiny)
    steps(model, 1)
    wrapped = layers(model)
    base = model.unload()
    assert not layers(base)
    assert same(bits(nn.ModuleList(wrapped)), held)
    with plain.disable_adapter():
        expected = logits(plain)
    assert torch.equal(logits(base), expected)


def test_merging_stores_the_sum_and_unmerging_the_bits(tiny: str) -> None:
    model = requantized(PISSA, tiny)
    move(model, 0.02)
    expected, held = logits(model), [value.clone() for value in bits(model)]
    whole = {layer.name: layer.base.matrix() + layer.lowrank("default").dense() for layer in layers(model)}
    with pytest.warns(UserWarning, match="Rounding to the base's storage lost"):
        model.merge_adapter()
    for layer in layers(model):
        assert (layer.base.matrix() - whole[layer.name]).norm() < 0.15 * whole[layer.name].norm()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert same(bits(model), held)


def test_unloading_a_merged_model_gives_the_first_back_or_the_sum(tiny: str) -> None:
    expected = logits(load(tiny, "nf4"))
    for merge in (False, True):
        model = requantized(PISSA, tiny)
        move(model, 0.02)
        with pytest.warns(UserWarning, match="Rounding to the base's storage lost"):
            model.merge_adapter()
        merged = logits(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = model.merge_and_unload() if merge else model.unload()
        assert not layers(base)
        assert torch.equal(logits(base), merged if merge else expected)


def test_another_adapter_starts_from_the_new_base(tiny: str) -> None:
    model = requantized(PISSA, tiny)
    with model.disable_adapter():
        expected = logits(model)
    model.add_adapter("other", KaSAConfig(r=4, target_modules="all-linear"))
    model.set_adapter("other")
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.isfinite(logits(model)).all()
    [layer, *_] = layers(model)
    smallest = torch.linalg.svdvals(layer.base.matrix())[-4:].sum()
    cut = layer.slots("other")
    assert torch.linalg.svdvals(cut["cut_left"] @ cut["cut_right"])[:4].sum() == pytest.approx(
        smallest.item(), rel=1e-3
    )


def test_an_evaluation_changes_neither_the_gradients_nor_the_bits(tiny: str) -> None:
    gradients, held = [], []
    for evaluated in (False, True):
        model = requantized(PISSA, tiny)
        move(model)
        if evaluated:
            logits(model)
            model.state_dict()
        ids = torch.arange(8)[None]
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in learning(model)]))
        held.append(list(bits(model)))
    assert torch.equal(*gradients)
    assert same(*held)


def test_a_base_layer_by_itself_reads_as_what_it_holds(tiny: str) -> None:
    """The guard of layers without a wrapper keeps scales too: not the first ones."""
    for layer in layers(requantized(PISSA, tiny)):
        assert torch.equal(BaseWeight(layer.base_layer).matrix(), layer.base.four_bits().matrix())


def test_a_copy_has_a_base_of_its_own(tiny: str) -> None:
    model = requantized(PISSA, tiny)
    expected, twin = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    twin.unload()
    assert torch.equal(logits(model), expected)


# Refusals -------------------------------------------------------------------------------------------------------


def halved() -> dict[str, torch.Tensor]:
    return {name: value * 0.5 for name, value in fresh().state_dict().items()}


def swapped() -> dict[str, torch.Tensor]:
    return {name: value.T if value.ndim == 2 else value for name, value in fresh().state_dict().items()}


def without_down() -> dict[str, torch.Tensor]:
    return {name: value for name, value in fresh().state_dict().items() if "down_proj" not in name}


REFUSED = [
    (PiSSAConfig(r=4), "nf4", {"iterations": 0}, "at least 1"),
    (PiSSAConfig(r=4), "nf4", {"adapter": "other"}, "adapter has to be one of"),
    (PiSSAConfig(r=4), "fp32", {}, "has to be bitsandbytes 4-bit. Found 'Linear'"),
    (PiSSAConfig(r=4), "int8", {}, "has to be bitsandbytes 4-bit. Found 'Linear8bitLt'"),
    (PiSSAConfig(r=4), "nf4", {"weights": halved()}, "the one that was quantised"),
    (PiSSAConfig(r=4), "nf4", {"weights": swapped()}, "has to be of shape|the one that was quantised"),
    (PiSSAConfig(r=4), "nf4", {"weights": without_down()}, r"down_proj.*\(2 of 14 missing\)"),
    (PiSSAConfig(r=4), "nf4", {"weights": "/nowhere"}, "a folder with safetensors files"),
]


@pytest.mark.parametrize("member", UNABLE, ids=str)
def test_other_members_are_refused_by_name(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny, "nf4"), member.config())
    with pytest.raises(ValueError, match=f"(start has to leave|frames have to be saved).*{member.name}"):
        requantize(model, tiny, iterations=1)


@pytest.mark.parametrize("member", [member for member in ABLE if member.name in ONCE], ids=str)
def test_iterating_another_start_than_the_largest_triples_is_refused(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny, "nf4"), member.config())
    with pytest.raises(ValueError, match="iterations has to be 1 for a start that is not at the largest"):
        requantize(model, tiny)


@pytest.mark.parametrize(("config", "kind", "given", "message"), REFUSED, ids=[row[-1] for row in REFUSED])
def test_what_cannot_be_is_refused_and_changes_nothing(
    config: Any, kind: str, given: Any, message: str, tiny: str
) -> None:
    config.target_modules = "all-linear"
    model = get_peft_model(load(tiny, kind), config)
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        requantize(model, **({"weights": tiny} | given))
    assert torch.equal(logits(model), before)


def test_it_is_done_once_before_training_and_alone(tiny: str) -> None:
    model = requantized(PISSA, tiny)
    with pytest.raises(ValueError, match="may be replaced once: unload first"):
        requantize(model, tiny)
    model = get_peft_model(load(tiny, "nf4"), PISSA.config())
    move(model)
    with pytest.raises(ValueError, match="before training, and before loading"):
        requantize(model, tiny)
    model = get_peft_model(load(tiny, "nf4"), PISSA.config())
    with pytest.raises(ValueError, match="has to be requantised before it is saved"):
        save_requantized(model, tiny)
    model.add_adapter("other", PISSA.config())
    with pytest.raises(ValueError, match="no other adapter"):
        requantize(model, tiny)
