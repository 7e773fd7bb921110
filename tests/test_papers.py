"""Each method against its paper's equations, written plainly in float64 in tests/reference, and against PEFT's own."""

from __future__ import annotations

import copy
import importlib
import warnings
from typing import Any

import bases
import pytest
import torch
from members import MEMBERS, REGULARIZED, VARIANTS, Member
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kasa import KaSAConfig, PiSSAConfig, SpectralLinear, penalty

R = 4
KASA, SORSA = (next(member for member in MEMBERS if member.name == name) for name in ("kasa", "sorsa"))
NAMES = ("0", "2", "4")  # wide, tall and square
SCALES: dict[str, tuple[dict[str, Any], list[int], list[float] | None]] = {  # config, ranks, scales (None: the paper's)
    "paper": ({}, [R, R, R], None),
    "alpha": ({"alpha": 6.0}, [R, R, R], [1.5, 1.5, 1.5]),
    "rslora": ({"alpha": 6.0, "use_rslora": True}, [R, R, R], [3.0, 3.0, 3.0]),
    "patterns": (
        {"alpha": 6.0, "rank_pattern": {"0": 2, "4": 5}, "alpha_pattern": {"2": 2.0, "4": 7.0}},
        [2, R, 5],
        [3.0, 0.5, 1.4],
    ),
}
# Whose triples or entries are drawn at random, or are not in the reference: tested one by one below.
UNSPECIFIED = ("svft random", "lora_xs noisy", "slora", "pissa middle", "milora random")
TRUNCATIONS: list[dict[str, Any]] = [
    {"truncation": truncation, "reference_truncation": rule} for rule in (False, True) for truncation in (None, 0, 3)
]
SPECIFIED = [member for member in [*MEMBERS, *VARIANTS] if str(member) not in UNSPECIFIED]
each_member = pytest.mark.parametrize("member", SPECIFIED, ids=str)
each_scale = pytest.mark.parametrize("case", SCALES.values(), ids=SCALES)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])
each_form = pytest.mark.parametrize("form", ["reference", "paper"])
each_truncation = pytest.mark.parametrize("options", TRUNCATIONS, ids=str)


def adapted(member: Member, **given: Any) -> tuple[PeftModel, list[SpectralLinear]]:
    """The stack with an adapter, and its layers."""
    model = get_peft_model(bases.stack(), member.config(**({"r": R, "target_modules": list(NAMES)} | given)))
    return model, [model.base_model.model[int(name)] for name in NAMES]


def reference(member: Member) -> Any:
    """The module in tests/reference of a member."""
    return importlib.import_module(f"reference.{member.name}")


def papers_start(member: Member, layer: SpectralLinear, r: int, s: float, **options: Any) -> tuple[Tensor, ...]:
    """The base, left, core and right of the paper at a layer of the stack, whatever the paper's start needs."""
    needs, evidence = member.config_class.needs, []
    if needs:
        found = bases.statistics(needs).evidence(layer.name)
        dense = found if isinstance(found, Tensor) else found.matrix(centred=needs == "inputs")
        evidence = [dense.double() / (bases.statistics(needs).seen if needs == "scaled inputs" else 1)]
    return reference(member).start(weight(layer), r, s, *evidence, **member.paper, **options)


def times(left: Tensor, core: Tensor) -> Tensor:
    return left * core if core.ndim == 1 else left @ core


def weight(layer: SpectralLinear) -> Tensor:
    """The base weight in float64."""
    return layer.base_layer.weight.detach().double()


def values(layer: SpectralLinear) -> tuple[Tensor, Tensor, Tensor]:
    """What the layer trains as it is now, in float64, as fresh leaves."""
    left, core, right = (part.detach().double().requires_grad_() for part in layer.value("default"))
    return left, core, right


def inputs(features: int, rows: int = 7) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(3))


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def check_outputs(member: Member, ranks: list[int], scales: list[float] | None, given: Any, options: Any) -> None:
    """Moves what learns by noise and compares each layer, and the stack of them, with the paper's equations."""
    model, layers = adapted(member, **given, **options)
    paper = reference(member)
    scales = scales or [paper.SCALE] * len(layers)
    bases.move(model)
    x = inputs(24)
    through = x.double()
    with torch.no_grad():
        for layer, r, s in zip(layers, ranks, scales, strict=True):
            base = papers_start(member, layer, r, s, **options)[0]
            expected = paper.forward(through, base, *values(layer), s) + layer.base_layer.bias
            assert distance(layer(through.float()), expected) < 1e-5
            assert distance(layer(through.float()), layer.base_layer(through.float())) > 1e-3  # it is not the base's
            through = expected.tanh() if layer is not layers[-1] else expected
        assert distance(model(x), through) < 1e-5


# Start ----------------------------------------------------------------------------------------------------------


@each_member
@each_scale
def test_start_is_the_papers(member: Member, case: Any) -> None:
    """s L C R as a matrix, which no choice of signs changes."""
    given, ranks, scales = case
    _, layers = adapted(member, **given)
    paper = reference(member)
    for layer, r, s in zip(layers, ranks, scales or [paper.SCALE] * 3, strict=True):
        _, left, core, right = papers_start(member, layer, r, s)
        found = layer.value("default")
        assert found.left.shape == left.shape
        assert found.right.shape == right.shape
        assert layer.adapters["default"].scale == pytest.approx(s)
        size = s * torch.linalg.matrix_norm(left, 2) * core.abs().max() * torch.linalg.matrix_norm(right, 2)
        bound = 1e-6 * torch.maximum(weight(layer).norm(), size)  # a pseudo-inverse is large, and its float32 rounding
        assert (s * found.dense() - s * times(left, core) @ right).norm() < bound


@pytest.mark.parametrize("member", [member for member in SPECIFIED if member.name != "kasa"], ids=str)
@each_scale
def test_factors_of_the_start_are_the_papers_up_to_pairs_of_signs(member: Member, case: Any) -> None:
    given, ranks, scales = case
    _, layers = adapted(member, **given)
    paper = reference(member)
    for layer, r, s in zip(layers, ranks, scales or [paper.SCALE] * 3, strict=True):
        _, left, core, right = papers_start(member, layer, r, s)
        found = layer.value("default")
        sign = (found.right * right).sum(1).sign()
        assert distance(found.left, left * sign) < 1e-5
        assert distance(found.core, core if core.ndim == 1 else sign[:, None] * core * sign) < 1e-5
        assert distance(found.right, right * sign[:, None]) < 1e-5


@each_truncation
def test_kasa_starts_from_the_truncated_weight(options: dict[str, Any]) -> None:
    """The paper keeps min(m, n) - t triples, the reference code n - t: it truncates nothing of the wide module."""
    _, layers = adapted(KASA, **options)
    for layer in layers:
        base, *_ = reference(KASA).start(weight(layer), R, 2.0, **options)
        x = inputs(layer.in_features)
        assert distance(layer(x), x.double() @ base.T + layer.base_layer.bias) < 1e-5


def test_kasas_rules_of_truncation_differ_where_the_module_is_wide() -> None:
    """So that the tests of `reference_truncation` mean something: m <= n - t loses nothing by the code's rule."""
    wide = torch.randn(12, 24, dtype=torch.float64)
    paper, *_ = reference(KASA).start(wide, R, 2.0)
    code, *_ = reference(KASA).start(wide, R, 2.0, reference_truncation=True)
    assert distance(code, wide) < 1e-12
    assert distance(paper, wide) > 1e-3


@pytest.mark.parametrize("given", [{"reference_truncation": True}, {"truncation": 0}, {"truncation": R}], ids=str)
def test_kasa_warns_where_it_cuts_narrow_weights_unasked(given: dict[str, Any]) -> None:
    narrow = {"r": R, "target_modules": ["0"]}
    with pytest.warns(UserWarning, match=f"{R} triples out of weights with fewer rows.*reference_truncation=True"):
        get_peft_model(nn.Sequential(nn.Linear(24, 12)), KaSAConfig(**narrow))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(nn.Sequential(nn.Linear(24, 12)), KaSAConfig(**narrow, **given))
        get_peft_model(nn.Sequential(nn.Linear(12, 24)), KaSAConfig(**narrow))


def test_kasas_samples_have_the_papers_distribution() -> None:
    """d ~ N(0, 1), R ~ U(-1/sqrt(n), 1/sqrt(n)), L = 0: the numbers themselves are the generator's."""
    model = get_peft_model(nn.Sequential(nn.Linear(310, 305)), KaSAConfig(r=300, target_modules=["0"]))
    left, core, right = model.base_model.model[0].value("default")
    _, _, d, sampled = reference(KASA).start(torch.eye(305, 310).double(), 300, 2.0)
    assert not left.any()
    assert abs(core.mean() - d.mean()).item() < 0.3
    assert abs(core.std() - d.std()).item() < 0.2
    assert right.abs().max() <= 310**-0.5
    assert (right.flatten().sort().values - sampled.flatten().sort().values).abs().max() < 0.02 * 310**-0.5


# Forward --------------------------------------------------------------------------------------------------------


@each_member
@each_scale
def test_output_after_training_is_the_papers(member: Member, case: Any) -> None:
    given, ranks, scales = case
    check_outputs(member, ranks, scales, given, {})


@each_truncation
def test_output_of_kasa_after_training_is_the_papers_for_every_truncation(options: dict[str, Any]) -> None:
    check_outputs(KASA, [R] * 3, None, {}, options)


def test_kasa_drops_inputs_of_the_trained_part_alone() -> None:
    """As the paper's code: the truncated weight sees x, the adapter drop(x)."""
    model, (layer, *_) = adapted(KASA, dropout=0.5)
    bases.move(model)
    x = inputs(24)
    torch.manual_seed(5)
    found = layer.train()(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    paper = reference(KASA)
    base, *_ = paper.start(weight(layer), R, 2.0)
    expected = paper.forward(x.double(), base, *values(layer), 2.0, dropped.double()) + layer.base_layer.bias
    assert distance(found, expected) < 1e-5
    assert distance(found, layer.eval()(x)) > 1e-2


@each_member
@each_scale
def test_gradient_of_the_output_is_the_papers(member: Member, case: Any) -> None:
    """By what learns, off the start: a difference from the start has the gradient of the value itself."""
    given, ranks, scales = case
    model, layers = adapted(member, **given)
    paper = reference(member)
    bases.move(model)
    for layer, r, s in zip(layers, ranks, scales or [paper.SCALE] * 3, strict=True):
        x, direction = inputs(layer.in_features), inputs(layer.out_features)
        point = dict(zip(("left", "core", "right"), values(layer), strict=True))
        base, *_ = papers_start(member, layer, r, s)
        expected = (paper.forward(x.double(), base, *point.values(), s) * direction).sum()
        shaped = layer.adapters["default"].config.shapes_core  # see the tests of cores that are functions
        slots = [slot for slot in member.learns if not (shaped and slot == "core")]
        if not slots:
            continue
        exact = torch.autograd.grad(expected, [point[slot] for slot in slots])
        learning = [layer.slots("default")[slot] for slot in slots]
        for found, truth in zip(torch.autograd.grad((layer(x) * direction).sum(), learning), exact, strict=True):
            assert distance(found, truth) < 1e-5


# Regularisers ---------------------------------------------------------------------------------------------------


def check_regulariser(member: Member, given: dict[str, Any], options: dict[str, Any]) -> None:
    """Its value and its gradient by everything that learns, at a point that training could have reached."""
    model, layers = adapted(member, **given, **options)
    bases.move(model)
    points = [values(layer) for layer in layers]
    expected = reference(member).regulariser(points, **options)
    expected_gradients = torch.autograd.grad(expected, [part for point in points for part in point], allow_unused=True)
    learning = [layer.slots("default")[slot] for layer in layers for slot in ("left", "core", "right")]
    found = penalty(model)
    gradients = torch.autograd.grad(found, learning, allow_unused=True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (exact is None)
        assert exact is None or distance(gradient, exact) < 1e-4


@each_form
@each_reduction
@each_scale
def test_kasas_regulariser_and_its_gradient_are_the_papers(form: str, reduction: str, case: Any) -> None:
    """The code's form builds n x n and m x m Grams; ours has r x r ones."""
    options = {"beta": 0.3, "gamma": 0.7, "form": form, "reduction": reduction}
    check_regulariser(KASA, case[0], options)


@each_reduction
@each_scale
def test_sorsas_regulariser_and_its_gradient_are_the_papers(reduction: str, case: Any) -> None:
    """`gamma` is the coefficient in the loss: the paper's update has gamma / eta there (SORSAConfig)."""
    check_regulariser(SORSA, case[0], {"gamma": 0.7, "reduction": reduction})


def test_kasas_forms_differ_at_the_start_by_about_what_is_documented() -> None:
    """Both have no gradient by L = 0; by R, the paper's is many times the code's (RoBERTa's shape: about 15)."""
    gradients = {}
    for form in ("reference", "paper"):
        config = KaSAConfig(r=8, target_modules=["0"], form=form, beta=0.0, gamma=1.0)
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(768, 768)), config)
        slots = model.base_model.model[0].slots("default")
        by_left, gradients[form] = torch.autograd.grad(penalty(model), [slots["left"], slots["right"]])
        assert not by_left.any()
    assert gradients["paper"].norm() / gradients["reference"].norm() == pytest.approx(14.7, rel=0.05)


def test_sorsas_regulariser_at_its_start_is_smoothed() -> None:
    """A departure that is documented: the norm has no gradient at 0, where the code follows rounding noise."""
    model, layers = adapted(SORSA, gamma=1.0, reduction="sum")
    found = penalty(model)
    gradients = torch.autograd.grad(found, [layer.slots("default")["left"] for layer in layers])
    assert found.item() == pytest.approx(3 * 1e-5, rel=0.05)
    assert max(gradient.norm().item() for gradient in gradients) < 0.1  # the unsmoothed one has norm 1


@pytest.mark.parametrize("member", [member for member in MEMBERS if not member.regularized], ids=str)
def test_regulariser_is_zero_where_the_paper_has_none(member: Member) -> None:
    model, layers = adapted(member)
    bases.move(model)
    assert penalty(model).item() == reference(member).regulariser([values(layer) for layer in layers], "mean").item()


@pytest.mark.parametrize("member", REGULARIZED, ids=str)
def test_mean_regulariser_is_the_sum_over_the_number_of_modules(member: Member) -> None:
    found = {}
    for reduction in ("mean", "sum"):
        model, layers = adapted(member, reduction=reduction)
        bases.move(model)
        found[reduction] = penalty(model).item()
    assert found["sum"] == pytest.approx(len(layers) * found["mean"], rel=1e-5)


# PEFT's own -----------------------------------------------------------------------------------------------------


def pefts(**given: Any) -> tuple[PeftModel, list[Any]]:
    """The same stack under PEFT's LoRA, and its layers."""
    model = get_peft_model(bases.stack(), LoraConfig(r=R, target_modules=list(NAMES), **given))
    return model, [model.base_model.model[int(name)] for name in NAMES]


@torch.no_grad()
def copy_into_peft(ours: list[SpectralLinear], theirs: list[Any]) -> None:
    """Our trained values as PEFT's lora_A, lora_B and, for KaSA, lora_diag."""
    for layer, lora in zip(ours, theirs, strict=True):
        left, core, right = layer.value("default")
        lora.lora_A["default"].weight.copy_(right)
        lora.lora_B["default"].weight.copy_(left)
        if hasattr(lora, "lora_diag"):
            lora.lora_diag["default"].copy_(core)


@pytest.mark.parametrize("alpha", [R, 6])
def test_pissa_is_pefts_pissa(alpha: int) -> None:
    """Differs as documented: PEFT rewrites the base weight, here what leaves is subtracted beside it."""
    ours = get_peft_model(bases.stack(), PiSSAConfig(r=R, alpha=alpha, target_modules=list(NAMES)))
    layers = [ours.base_model.model[int(name)] for name in NAMES]
    theirs, loras = pefts(lora_alpha=alpha, init_lora_weights="pissa")
    x = inputs(24)
    assert distance(ours(x), theirs(x)) < 1e-5
    for layer, lora in zip(layers, loras, strict=True):
        moved = (weight(layer) - lora.base_layer.weight.double()).norm()
        assert moved > 0.1 * weight(layer).norm()
        start = layer.value("default").scaled(layer.adapters["default"].scale).dense()
        assert distance(start, lora.get_delta_weight("default")) < 1e-5
    bases.move(ours)
    copy_into_peft(layers, loras)
    assert distance(ours(x), theirs(x)) < 1e-5
    assert distance(ours(x), bases.stack()(x)) > 1e-2


def our_and_pefts_kasa(beta: float = 0.3, gamma: float = 0.7) -> tuple[PeftModel, list[Any], PeftModel, list[Any]]:
    config = KaSAConfig(r=R, alpha=6, target_modules=list(NAMES), beta=beta, gamma=gamma, form="paper", reduction="sum")
    ours = get_peft_model(bases.stack(), config)
    theirs, loras = pefts(lora_alpha=6, kasa_config=KasaConfig(beta=beta, gamma=gamma))
    return ours, [ours.base_model.model[int(name)] for name in NAMES], theirs, loras


@torch.no_grad()
def copy_from_peft(loras: list[Any], layers: list[SpectralLinear]) -> None:
    """PEFT's lora_B, lora_diag, lora_A, all moved off their start, as our left, core, right."""
    generator = torch.Generator().manual_seed(4)
    for lora, layer in zip(loras, layers, strict=True):
        lora.lora_B["default"].weight.normal_(0, 0.3, generator=generator)
        slots = layer.slots("default")
        slots["left"].copy_(lora.lora_B["default"].weight)
        slots["core"].copy_(lora.lora_diag["default"])
        slots["right"].copy_(lora.lora_A["default"].weight)


def test_kasa_has_pefts_outputs() -> None:
    """Same numbers in, same outputs. Differs as documented: PEFT's base weight is overwritten, ours is not."""
    ours, layers, theirs, loras = our_and_pefts_kasa()
    copy_from_peft(loras, layers)
    x = inputs(24)
    assert distance(ours(x), theirs(x)) < 1e-5
    with ours.disable_adapter():
        assert torch.equal(ours(x), bases.stack()(x))
    with theirs.disable_adapter():
        assert distance(theirs(x), bases.stack()(x)) > 1e-3


def test_kasa_drops_from_the_weight_what_peft_truncates() -> None:
    _, layers, _, loras = our_and_pefts_kasa()
    for layer, lora in zip(layers, loras, strict=True):
        slots = layer.slots("default")
        cut = slots["cut_left"] @ slots["cut_right"]
        assert torch.equal(layer.base_layer.weight, bases.stack()[int(layer.name)].weight)
        assert distance(layer.base_layer.weight - cut, lora.base_layer.weight) < 1e-5
        assert distance(layer.base_layer.weight, lora.base_layer.weight) > 1e-3


def test_kasas_paper_form_is_pefts_regulariser() -> None:
    """PEFT's helper is private, sums over layers and has only the paper's form; ours acts by itself, as a mean."""
    ours, layers, theirs, loras = our_and_pefts_kasa()
    copy_from_peft(loras, layers)
    expected = theirs.base_model._get_kasa_loss()
    assert penalty(ours).item() == pytest.approx(expected.item(), rel=1e-6)
    for layer, lora in zip(layers, loras, strict=True):
        slots = layer.slots("default")
        mine = torch.autograd.grad(penalty(ours), [slots["left"], slots["core"], slots["right"]])
        pair = [lora.lora_B["default"].weight, lora.lora_diag["default"], lora.lora_A["default"].weight]
        for found, exact in zip(mine, torch.autograd.grad(theirs.base_model._get_kasa_loss(), pair), strict=True):
            assert distance(found, exact) < 1e-5


def test_kasas_reference_form_is_not_pefts() -> None:
    """The default here is the code's form, for which beta and gamma were chosen."""
    ours, layers, theirs, loras = our_and_pefts_kasa()
    copy_from_peft(loras, layers)
    other = copy.deepcopy(ours)
    other.peft_config["default"].form = "reference"
    for name in NAMES:
        other.base_model.model[int(name)].adapters["default"].config.form = "reference"
    assert penalty(other).item() > 1.5 * theirs.base_model._get_kasa_loss().item()
