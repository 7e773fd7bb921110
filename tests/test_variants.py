"""What else a config can be: the contract for each variant, and the choices that only some methods have."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import learning, load, logits, move, stack
from members import MEMBERS, VARIANTS, Member
from peft import PeftModel, get_peft_model
from reference import spectral_adapter as rotation_paper
from reference import svf as svf_paper
from reference import svft as svft_paper
from torch import Tensor, nn

from peft_kasa import (
    LoRAXSConfig,
    MiLoRAConfig,
    PiSSAConfig,
    SpectralAdapterConfig,
    SpectralConfig,
    SpectralLinear,
    SVFConfig,
    SVFTConfig,
    export_lora,
    to_lora,
)

TARGETS = ["q_proj", "up_proj", "down_proj"]  # square, tall and wide
NAMES = ["0", "2", "4"]  # of the stack: wide, tall and square
each_variant = pytest.mark.parametrize("member", VARIANTS, ids=str)
each_kind = pytest.mark.parametrize("kind", ["fp32", "nf4"])
each_name = pytest.mark.parametrize("name", NAMES)


def adapted(member: Member, tiny: str, kind: str, **given: Any) -> PeftModel:
    return get_peft_model(load(tiny, kind), member.config(**({"target_modules": TARGETS} | given)))


def layers_of(model: nn.Module) -> list[SpectralLinear]:
    return [module for module in model.modules() if isinstance(module, SpectralLinear)]


def on_stack(config_class: type[SpectralConfig], **given: Any) -> dict[str, SpectralLinear]:
    """The layers of the stack under a config, by name."""
    model = get_peft_model(stack(), config_class(**({"r": 4, "target_modules": NAMES} | given)))
    return {layer.name: layer for layer in layers_of(model)}


def weight(layer: SpectralLinear) -> Tensor:
    return layer.base_layer.weight.detach().double()


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


# The contract -----------------------------------------------------------------------------------------------------


@each_variant
@each_kind
@pytest.mark.parametrize("training", [False, True])
def test_starts_at_the_base_where_that_is_promised_and_not_elsewhere(
    member: Member, kind: str, training: bool, tiny: str
) -> None:
    base, model = load(tiny, kind), adapted(member, tiny, kind, dropout=0.5, alpha=12)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        found, expected = (each.train(training)(input_ids=ids).logits for each in (model, base))
    assert torch.equal(found, expected) == member.identity


@each_variant
def test_parameter_count_is_the_formula(member: Member, tiny: str) -> None:
    model = adapted(member, tiny, "fp32", r=3, rank_pattern={"q_proj": 5})
    expected = sum(
        member.parameters(layer.out_features, layer.in_features, 5 if "q_proj" in layer.name else 3)
        for layer in layers_of(model)
    )
    assert sum(parameter.numel() for parameter in learning(model)) == expected


@each_variant
@each_kind
def test_every_learning_slot_gets_a_gradient_and_no_other(member: Member, kind: str, tiny: str) -> None:
    model = adapted(member, tiny, kind)
    move(model)
    model(input_ids=(ids := torch.arange(8)[None]), labels=ids).loss.backward()
    for layer in layers_of(model):
        for slot, value in layer.slots("default").items():
            assert (value.grad is not None and bool(value.grad.any())) == (slot in member.learns), (layer.name, slot)
            assert value.dtype == torch.float32


@each_variant
@each_kind
def test_merging_gives_the_adapters_output_and_unmerging_the_bits(member: Member, kind: str, tiny: str) -> None:
    model = adapted(member, tiny, kind)
    move(model, 0.02)
    before, expected = [layer.base.matrix().clone() for layer in layers_of(model)], logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    assert distance(logits(model), expected) <= (1e-5 if kind == "fp32" else 0.6)
    model.unmerge_adapter()
    assert all(torch.equal(old, layer.base.matrix()) for old, layer in zip(before, layers_of(model), strict=True))
    assert torch.equal(logits(model), expected)


@each_variant
@each_kind
def test_export_is_exact_at_the_promised_rank(member: Member, kind: str, tiny: str, tmp_path: Path) -> None:
    model = adapted(member, tiny, kind, alpha=6)
    move(model)
    expected = logits(model)
    report = export_lora(model, tmp_path)
    assert report.rank == 4 * member.export_rank
    assert not any(report.errors.values())
    assert distance(logits(PeftModel.from_pretrained(load(tiny, kind), str(tmp_path))), expected) <= 1e-5


@each_variant
@each_kind
def test_reload_is_exact_and_disabling_gives_the_base(member: Member, kind: str, tiny: str, tmp_path: Path) -> None:
    model = adapted(member, tiny, kind)
    move(model)
    model.save_pretrained(str(tmp_path))
    again, base = PeftModel.from_pretrained(load(tiny, kind), str(tmp_path)), logits(load(tiny, kind))
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), base)
    with again.disable_adapter():
        assert torch.equal(logits(again), base)
    assert torch.equal(logits(again.unload()), base)


@each_variant
def test_the_seed_matters_where_the_start_is_random_and_nowhere_else(member: Member) -> None:
    def start(seed: int) -> list[dict[str, Tensor]]:
        model = get_peft_model(stack(), member.config(target_modules=NAMES, seed=seed))
        return [layer.slots("default") for layer in layers_of(model)]

    def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
        return all(torch.equal(a[slot], b[slot]) for a, b in zip(one, other, strict=True) for slot in a)

    assert same(start(0), start(0))
    assert same(start(0), start(5)) != member.random


# All triples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [SVFConfig, SVFTConfig])
def test_all_triples_are_exported_at_the_smaller_side(config_class: type[SpectralConfig], tmp_path: Path) -> None:
    model = get_peft_model(stack(), config_class(target_modules=NAMES))
    move(model)
    assert config_class().r is None
    _, tensors, report = to_lora(model, uniform=False)
    ranks = [tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] for name in NAMES]
    assert ranks == [12, 12, 20]
    assert report.rank == 20
    export_lora(model, tmp_path)
    x = torch.randn(3, 24)
    assert distance(PeftModel.from_pretrained(stack(), str(tmp_path))(x), model(x)) < 1e-5


@pytest.mark.parametrize("config_class", [SVFConfig, SVFTConfig])
def test_all_triples_of_a_wide_weight_are_no_lora(config_class: type[SpectralConfig], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(600, 600))
    model = get_peft_model(base, config_class(target_modules=["0"]))
    move(model)
    with pytest.raises(ValueError, match=r"exact LoRA has rank 600 \(0\), above 512.*Pass rank=.*merge_and_unload"):
        export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())
    report = export_lora(model, tmp_path, rank=64)
    assert report.rank == 64
    assert 0 < report.errors["0"] < 1
    x = torch.randn(3, 600)
    expected = model(x)
    assert distance(model.merge_and_unload()(x), expected) < 1e-5


# Cores that are functions of what learns --------------------------------------------------------------------------


def check_core(layer: SpectralLinear, core: Tensor, raw: Tensor, left: Tensor, right: Tensor, start: Tensor) -> None:
    """The core, the layer's output and its gradient by what learns, against float64. `core` is a function of `raw`."""
    scale, learns = layer.adapters["default"].scale, layer.slots("default")["core"]
    found = layer.value("default").core
    dense = torch.diag(found) if found.ndim == 1 and core.ndim == 2 else found
    assert distance(dense, core) < 1e-5
    x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(3))
    direction = torch.randn(7, layer.out_features, generator=torch.Generator().manual_seed(4))
    change = core - start
    change = torch.diag(change) if change.ndim == 1 else change
    expected = x.double() @ (weight(layer) + scale * left @ change @ right).T + layer.base_layer.bias.double()
    output = layer(x)
    assert distance(output, expected) < 1e-5
    (gradient,) = torch.autograd.grad((output * direction).sum(), learns)
    (exact,) = torch.autograd.grad((expected * direction.double()).sum(), raw)
    assert distance(gradient, exact) < 1e-5
    assert exact.norm() > 0.1


def moved(layer: SpectralLinear, size: float = 0.5) -> Tensor:
    """What the core's slot stands for after noise, in float64: the start where that left the base, and the slot."""
    slots = layer.slots("default")
    with torch.no_grad():
        slots["core"].add_(size * torch.randn(slots["core"].shape, generator=torch.Generator().manual_seed(8)))
    start = slots["core0"].double() if "core0" in slots else 0.0
    return (start + slots["core"].detach().double()).requires_grad_()


def triples(layer: SpectralLinear, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the weight, in float64, with the signs of the layer's own."""
    u, s, v = torch.linalg.svd(weight(layer), full_matrices=False)
    right = layer.slots("default")["right0" if "right0" in layer.slots("default") else "right"]
    sign = (v[:k] * right).sum(1).sign()
    return u[:, :k] * sign, s[:k], v[:k] * sign[:, None]


@each_name
@pytest.mark.parametrize("r", [4, None])
def test_svfs_gate_is_the_codes(name: str, r: int | None) -> None:
    layer = on_stack(SVFConfig, form="gate", r=r, alpha=6.0)[name]
    raw = moved(layer)
    u, s, v = triples(layer, len(raw))
    start = svf_paper.core(svf_paper.raw(len(s), "gate"), s, "gate")
    assert distance(start, torch.ones(len(s))) < 1e-12
    core = svf_paper.core(raw, s, "gate")
    assert (core * s).sum().item() == pytest.approx(s.sum().item())
    check_core(layer, core, raw, u * s, v, start)


@each_name
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top_k"])
def test_svfts_core_is_the_papers(name: str, gate: bool, pattern: str) -> None:
    layer = on_stack(SVFTConfig, pattern=pattern, width=0 if pattern == "plain" else 2, gate=gate, alpha=6.0)[name]
    raw = moved(layer)
    u, _, v = triples(layer, 4)
    rows, cols = entries(layer)
    core = svft_paper.core(raw, rows, cols, 4, gate)
    check_core(layer, core, raw, u, v, torch.zeros(4, 4, dtype=torch.float64))


@each_name
@pytest.mark.parametrize("part", ["top", "bottom"])
def test_spectral_adapters_rotation_is_the_papers(name: str, part: str) -> None:
    layer = on_stack(SpectralAdapterConfig, variant="rotation", part=part, alpha=6.0)[name]
    raw = moved(layer)
    u, s, v = torch.linalg.svd(weight(layer), full_matrices=False)
    chosen = slice(0, 4) if part == "top" else slice(len(s) - 4, len(s))
    sign = (v[chosen] * layer.slots("default")["right0"]).sum(1).sign()
    u, s, v = u[:, chosen] * sign, s[chosen], v[chosen] * sign[:, None]
    a, b, c = raw.split([16, 16, 4])
    core = rotation_paper.core(a.view(4, 4), b.view(4, 4), c, s)
    check_core(layer, core, raw, u, v, torch.diag(s))
    for turn in (a, b):  # rotations whatever is learnt
        found = rotation_paper.cayley(turn.detach().view(4, 4))
        assert distance(found @ found.T, torch.eye(4)) < 1e-12


# Parts of the spectrum --------------------------------------------------------------------------------------------


def share_of_triples(layer: SpectralLinear) -> Tensor:
    """How much of each triple of the weight the start holds: 1 or 0, and nothing besides them."""
    start = layer.value("default").scaled(layer.adapters["default"].scale).dense().detach().double()
    u, s, v = torch.linalg.svd(weight(layer), full_matrices=False)
    shares = (u.T @ start @ v.T).diagonal() / s
    assert distance(u * (shares * s) @ v, start) < 1e-5
    return shares


@pytest.mark.parametrize("config_class", [PiSSAConfig, MiLoRAConfig, SpectralAdapterConfig])
@each_name
def test_parts_are_slices_of_the_dense_decomposition(config_class: type[SpectralConfig], name: str) -> None:
    size = 12 if name != "4" else 20
    places = {"top": range(4), "bottom": range(size - 4, size), "middle": range((size - 4) // 2, (size + 4) // 2)}
    for part, place in places.items():
        layer = on_stack(config_class, part=part)[name]
        expected = torch.zeros(size, dtype=torch.float64)
        expected[list(place)] = 1
        assert torch.allclose(share_of_triples(layer), expected, atol=1e-5), part


@pytest.mark.parametrize("config_class", [PiSSAConfig, MiLoRAConfig, SpectralAdapterConfig])
def test_random_parts_are_distinct_triples_drawn_by_seed_and_module(config_class: type[SpectralConfig]) -> None:
    def chosen(seed: int) -> dict[str, list[int]]:
        shares = {
            name: share_of_triples(layer) for name, layer in on_stack(config_class, part="random", seed=seed).items()
        }
        for share in shares.values():
            assert torch.allclose(share, share.round(), atol=1e-5)
            assert share.round().sum() == 4
        return {name: share.round().nonzero()[:, 0].tolist() for name, share in shares.items()}

    torch.manual_seed(1)
    first = chosen(0)
    torch.manual_seed(2)
    assert chosen(0) == first
    assert first["0"] != first["2"]  # both of 12 triples
    others = [chosen(seed) for seed in range(1, 40)]
    assert all(other != first for other in others)
    drawn = {index for other in others for index in other["0"]}
    assert drawn == set(range(12))


# Samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [None, 1e-3])
def test_lora_xs_starts_at_a_little_noise(std: float | None) -> None:
    given = {} if std is None else {"std": std}
    model = get_peft_model(
        nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96)), LoRAXSConfig(r=64, target_modules=["0", "1"], **given)
    )
    cores = [layer.slots("default")["core"].detach().double() / (std or 1e-5) for layer in layers_of(model)]
    for core in cores:
        assert abs(core.mean()) < 4 / 64
        assert core.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * 4096))
        assert ((core.abs() < 1).double().mean().item()) == pytest.approx(0.6827, abs=0.03)
        assert core.pow(4).mean().item() == pytest.approx(3, abs=0.6)
    assert abs((cores[0] * cores[1]).mean()) < 4 / 64  # each module its own


@pytest.mark.parametrize("gate", [True, False])
def test_svfts_reference_start_has_its_variance(gate: bool) -> None:
    config = SVFTConfig(pattern="banded", width=40, init="reference", gate=gate, target_modules=["0"])
    raw = layers_of(get_peft_model(nn.Sequential(nn.Linear(96, 96)), config))[0].slots("default")["core"].detach()
    values, count = (raw[:-1] if gate else raw), svft_paper.entries(96, 40)
    assert len(values) == count
    assert values.std().item() == pytest.approx((2 / count) ** 0.5, rel=4 / math.sqrt(2 * count))
    assert not gate or raw[-1] == 0


# SVFT's patterns --------------------------------------------------------------------------------------------------


def entries(layer: SpectralLinear) -> tuple[Tensor, Tensor]:
    """Rows and columns of what learns."""
    slots = layer.slots("default")
    if "fixed" not in slots:
        index = torch.arange(len(slots["right"]))
        return index, index
    rows, cols = slots["fixed"].long()
    assert torch.equal(torch.stack([rows, cols]).float(), slots["fixed"])
    return rows, cols


@each_name
@pytest.mark.parametrize("pattern", ["banded", "random", "top_k"])
@pytest.mark.parametrize("width", [0, 1, 3, 11, 99])
@pytest.mark.parametrize("r", [5, None])
def test_patterns_have_their_count_of_entries_each_once(name: str, pattern: str, width: int, r: int | None) -> None:
    layer = on_stack(SVFTConfig, pattern=pattern, width=width, r=r, target_modules=[name])[name]
    k = r or (20 if name == "4" else 12)
    rows, cols = entries(layer)
    count = svft_paper.entries(k, width)
    assert len(rows) == len(cols) == count == layer.slots("default")["core"].numel() - 1
    assert {*rows.tolist(), *cols.tolist()} <= set(range(k))
    places = [(row, col) for row, col in zip(rows.tolist(), cols.tolist(), strict=True)]
    assert len(set(places)) == count
    assert places == sorted(places)
    if pattern == "banded":
        assert set(places) == {(i, j) for i in range(k) for j in range(k) if abs(i - j) <= width}
    if pattern == "top_k":
        u, _, v = triples(layer, k)
        q = min(weight(layer).shape)
        score = (u[:q].T @ v[:, :q].T).abs()
        chosen = torch.zeros(k, k, dtype=torch.bool)
        chosen[rows, cols] = True
        rest = score[~chosen]
        assert score[chosen].min() >= (rest.max() if len(rest) else 0) - 1e-6
    if pattern == "random" and count < k * k:
        other = on_stack(SVFTConfig, pattern=pattern, width=width, r=r, target_modules=[name], seed=7)[name]
        again = on_stack(SVFTConfig, pattern=pattern, width=width, r=r, target_modules=[name])[name]
        assert torch.equal(again.slots("default")["fixed"], layer.slots("default")["fixed"])
        assert not torch.equal(other.slots("default")["fixed"], layer.slots("default")["fixed"])


def test_random_patterns_may_fall_anywhere() -> None:
    """Over seeds, each place of a 5 x 5 core is drawn about as often as another."""
    total = torch.zeros(5, 5)
    for seed in range(60):
        layer = on_stack(SVFTConfig, pattern="random", r=5, seed=seed, target_modules=["0"])["0"]
        total[entries(layer)] += 1
    assert total.sum() == 60 * 5
    assert 2 <= total.min() <= total.max() <= 25  # 12 each on the average


def test_plain_is_banded_of_width_zero() -> None:
    plain, banded = (on_stack(SVFTConfig, pattern=pattern) for pattern in ("plain", "banded"))
    for name in NAMES:
        raws = [moved(layers[name]) for layers in (plain, banded)]
        assert torch.equal(*raws)
        assert plain[name].value("default").core.ndim == 1
        assert distance(plain[name].get_delta_weight("default"), banded[name].get_delta_weight("default")) < 1e-6


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config_class", "given", "said"),
    [
        (PiSSAConfig, {"part": "left"}, r"part has to be 'top' or 'bottom' or 'middle' or 'random'\. Found 'left'"),
        (MiLoRAConfig, {"part": 3}, "part has to be"),
        (SpectralAdapterConfig, {"part": ""}, "part has to be"),
        (SpectralAdapterConfig, {"variant": "rotate"}, "variant has to be 'additive' or 'rotation'"),
        (SVFConfig, {"form": "sigmoid"}, "form has to be 'plain' or 'gate'"),
        (SVFTConfig, {"pattern": "dense"}, "pattern has to be 'plain' or 'banded' or 'random' or 'top_k'"),
        (SVFTConfig, {"width": 2}, "width needs another pattern than 'plain'"),
        (SVFTConfig, {"pattern": "banded", "width": -1}, "width has to be a whole number of at least 0"),
        (SVFTConfig, {"pattern": "banded", "width": 1.5}, "width has to be a whole number"),
        (SVFTConfig, {"init": "code"}, "init has to be 'zero' or 'reference'"),
        (LoRAXSConfig, {"sigma": "both"}, "sigma has to be 'right' or 'left'"),
        (LoRAXSConfig, {"std": -1e-5}, "std has to be at least 0"),
    ],
)
def test_what_is_not_a_choice_is_refused(config_class: type[SpectralConfig], given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_class(**given)


def test_every_variant_is_of_a_member() -> None:
    assert {member.name for member in VARIANTS} <= {member.name for member in MEMBERS}
    assert len({str(member) for member in [*MEMBERS, *VARIANTS]}) == len(MEMBERS) + len(VARIANTS)
