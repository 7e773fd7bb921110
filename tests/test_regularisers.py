"""Regularisers act once per optimiser step and at their right size, whatever trains."""

from __future__ import annotations

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import effect
import pytest
import torch
from bases import learning, load, move, stack, steps, tokens
from datasets import Dataset
from effect import Step
from members import REGULARIZED, Member
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_kasa import SORSAConfig, penalty
from peft_kasa.training import regularise

each_regularized = pytest.mark.parametrize("member", REGULARIZED, ids=str)

STRONG: dict[str, Any] = {"kasa": {"beta": 1.0, "gamma": 1.0, "form": "paper"}, "sorsa": {"gamma": 1.0}}


def model_of(name: str, folder: str, kind: str = "fp32") -> PeftModel:
    """A member with a strong regulariser, away from its start."""
    member = next(row for row in REGULARIZED if row.name == name)
    model = get_peft_model(load(folder, kind), member.config(**STRONG[name]))
    move(model, 0.02)
    return model


def batches(count: int) -> list[torch.Tensor]:
    return [tokens(seed=seed) for seed in range(count)]


DATA = Dataset.from_dict({"input_ids": tokens(8).tolist(), "labels": tokens(8).tolist()})

WAYS: dict[str, Step] = {
    "loop": effect.loop(batches(1)),
    "loop, 4 accumulated": effect.loop(batches(4)),
    "bf16 autocast": effect.loop(batches(2), torch.bfloat16),
    "fp16, scaler": effect.scaled(batches(2), fused=False),
    "fp16, scaler, fused": effect.scaled(batches(2), fused=True),
    "fp16, scaler, fused, unscaled before": effect.scaled(batches(2), fused=True, unscale=True),
    "closure": effect.closure(batches(2)),
    "closure by keyword": effect.closure(batches(2), keyword=True),
    "accelerate, 4 accumulated": effect.accelerated(batches(4)),
    "Trainer": effect.trainer(Trainer, TrainingArguments, DATA, 1),
    "Trainer, 4 accumulated": effect.trainer(Trainer, TrainingArguments, DATA, 4),
    "Trainer, bf16": effect.trainer(Trainer, TrainingArguments, DATA, 1, bf16=True),
}


def sft(accumulate: int, **given: Any) -> Step:
    """SFTTrainer on tokenised rows."""

    class Plain(SFTTrainer):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments, processing_class=_tokenizer())

    return effect.trainer(Plain, partial(SFTConfig, **given), DATA.remove_columns("labels"), accumulate)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(63)} | {"<eos>": 63}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


WAYS |= {
    "SFTTrainer": sft(1),
    "SFTTrainer, 4 accumulated": sft(4),
    "SFTTrainer, bf16": sft(2, bf16=True),
}


@each_regularized
@pytest.mark.parametrize("way", WAYS)
def test_effective_over_intended_is_one(member: Member, way: str, tiny: str) -> None:
    ratio, off = effect.effect(model_of(member.name, tiny), WAYS[way])
    assert ratio == pytest.approx(1, abs=0.005)
    assert off < 0.02  # rounding of the two runs


@each_regularized
def test_effective_over_intended_is_one_on_four_bits(member: Member, tiny: str) -> None:
    ratio, _ = effect.effect(model_of(member.name, tiny, "nf4"), WAYS["loop"])
    assert ratio == pytest.approx(1, abs=0.005)


@pytest.fixture(scope="module")
def in_two_processes(tiny: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Started once for all."""
    makes = {member.name: partial(model_of, member.name, tiny) for member in REGULARIZED}
    return effect.in_processes(makes, batches(2), ["ddp", "fsdp"])


@each_regularized
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_effective_over_intended_is_one_in_two_processes(member: Member, way: str, in_two_processes: Any) -> None:
    ratio, off = in_two_processes[member.name, way]
    assert ratio == pytest.approx(1, abs=0.005)
    assert off < 0.02


def two_optimisers(batches: list[torch.Tensor]) -> Step:
    """Matrices in one and cores in another, as with Muon."""

    def step(model: nn.Module) -> None:
        effect.backward(model.train(), batches, lambda loss: loss)
        for wanted in (1, 2):
            torch.optim.SGD([p for p in learning(model) if p.ndim == wanted], lr=1.0).step()

    return step


class Wrapping(torch.optim.Optimizer):
    """An optimiser whose step is another's, as Lookahead or ZeroRedundancyOptimizer have it."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def wrapped(batches: list[torch.Tensor]) -> Step:
    def step(model: nn.Module) -> None:
        effect.backward(model.train(), batches, lambda loss: loss)
        Wrapping(effect.sgd(model)).step()

    return step


def inside_autocast(batches: list[torch.Tensor]) -> Step:
    def step(model: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            effect.backward(model.train(), batches, lambda loss: loss)
            effect.sgd(model).step()

    return step


WAYS |= {
    "two optimisers": two_optimisers(batches(2)),
    "wrapped optimiser": wrapped(batches(2)),
    "step inside autocast": inside_autocast(batches(2)),
}


@each_regularized
@pytest.mark.parametrize("clear", [True, False])
def test_every_step_gets_it_again(member: Member, clear: bool, tiny: str) -> None:
    """Three steps at lr 1e-3 under no other loss: each moves along the penalty's gradient at that point."""
    model = model_of(member.name, tiny)
    optimizer = torch.optim.SGD(learning(model), lr=1e-3)
    for _ in range(3):
        intended = torch.autograd.grad(penalty(model), learning(model), materialize_grads=True)
        before = [parameter.detach().clone() for parameter in learning(model)]
        sum((parameter * 0).sum() for parameter in learning(model)).backward()  # type: ignore[union-attr]
        optimizer.step()
        for parameter, begun, gradient in zip(learning(model), before, intended, strict=True):
            assert torch.allclose(begun - parameter, 1e-3 * gradient, atol=1e-6)
        optimizer.zero_grad(set_to_none=clear)


class ByName(torch.optim.SGD):
    """An optimiser that takes its closure by name alone."""

    def step(self, *, closure: Any = None) -> Any:
        return super().step(closure)


class Noting(torch.optim.SGD):
    """An optimiser whose step takes more than a closure."""

    def step(self, closure: Any = None, note: str = "") -> Any:
        assert note == "kept"
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "given", "named"),
    [(torch.optim.SGD, (), False), (ByName, (), True), (Noting, ("kept",), False)],
    ids=["by place", "by name alone", "and more"],
)
@pytest.mark.parametrize("told", [torch.Tensor.detach, torch.Tensor.item])
def test_a_closure_is_handed_on_as_it_was_given_and_tells_the_sum(
    kind: type[torch.optim.SGD], given: tuple[Any, ...], named: bool, told: Any, tiny: str
) -> None:
    model = model_of("sorsa", tiny)
    optimizer, value = kind(learning(model), lr=1e-3), penalty(model).item()
    loss = torch.tensor(2.0)
    found = optimizer.step(closure=lambda: told(loss)) if named else optimizer.step(lambda: told(loss), *given)
    assert isinstance(found, type(told(loss)))
    assert float(found) == pytest.approx(2 + value, rel=1e-6)
    assert value > 0.01


@each_regularized
def test_lbfgs_minimises_the_loss_and_the_penalty(member: Member, tiny: str) -> None:
    model = model_of(member.name, tiny)
    optimizer = torch.optim.LBFGS(learning(model), lr=1, max_iter=20, line_search_fn="strong_wolfe")

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        return sum((parameter * 0).sum() for parameter in learning(model))  # type: ignore[return-value]

    before = penalty(model).item()
    optimizer.step(evaluate)
    assert penalty(model).item() < 0.7 * before


@each_regularized
def test_reductions_differ_by_the_number_of_modules(member: Member, tiny: str) -> None:
    mean, total = (
        penalty(get_peft_model(load(tiny), member.config(reduction=reduction))).item() for reduction in ("mean", "sum")
    )
    assert total == pytest.approx(14 * mean, rel=1e-4)


@each_regularized
def test_switched_off_it_does_nothing(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config(**STRONG[member.name], regularize=False))
    assert penalty(model).item() == 0
    assert penalty(model, "default").item() > 0
    before = [parameter.detach().clone() for parameter in learning(model)]
    effect.sgd(model).step()
    assert all(torch.equal(a, b) for a, b in zip(before, learning(model), strict=True))


@each_regularized
def test_only_active_adapters_count(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config(**STRONG[member.name]))
    one = penalty(model).item()
    model.add_adapter("other", member.config(**STRONG[member.name], seed=3))
    assert penalty(model).item() == pytest.approx(one)
    model.base_model.set_adapter(["default", "other"])
    assert penalty(model).item() > 1.5 * one
    with pytest.raises(ValueError, match="Found 'none such'"):
        penalty(model, "none such")


@pytest.fixture
def _forgotten() -> None:
    for seen in (regularise._claimed, regularise._suspected, regularise._warned):
        seen.clear()
    for layer in regularise.living():  # models of other tests
        for known in layer.adapters.values():
            known.trained = False
    return


@pytest.mark.usefixtures("_forgotten")
@each_regularized
def test_warns_when_no_optimiser_holds_its_parameters(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config())
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.step()
        other.step()  # nothing of the family is being trained yet
    model.train()(input_ids=tokens())
    other.step()
    with pytest.warns(UserWarning, match=r"layers.*'default' are in no optimiser.*penalty\(model, 'default'\)"):
        other.step()


@pytest.mark.usefixtures("_forgotten")
@each_regularized
def test_two_optimisers_in_turn_are_no_cause_for_a_warning(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config())
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        steps(model, 1)
        other.step()
        steps(model, 1)
        other.step()


@pytest.mark.usefixtures("_forgotten")
def test_an_optimiser_for_each_parameter_is_no_cause_for_a_warning(tiny: str) -> None:
    """As GaLore's layerwise way has it: each steps in the backward pass, the last layer's first."""
    model = model_of("sorsa", tiny)
    for parameter in learning(model):
        own = torch.optim.SGD([parameter], lr=1e-3)
        parameter.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
    before = penalty(model).item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(2):
            ids = tokens(seed=seed)
            (model.train()(input_ids=ids, labels=ids).loss * 0).backward()
            model.zero_grad()
    assert penalty(model).item() < before


@pytest.mark.usefixtures("_forgotten")
@each_regularized
def test_the_trainer_warns_and_logs(member: Member, tiny: str, tmp_path: Any) -> None:
    model = get_peft_model(load(tiny), member.config(**STRONG[member.name]))
    arguments = TrainingArguments(str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True)
    trained = Trainer(model, arguments, train_dataset=DATA)
    before = penalty(model).item()
    trained.train()
    logged = [entry["penalty"] for entry in trained.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all(abs(value - before) < 0.2 * before + 1e-3 for value in logged)
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(foreign, lambda _: 1.0)
    with pytest.warns(UserWarning, match="are in no optimiser that has stepped"):
        Trainer(model, arguments, train_dataset=DATA, optimizers=(foreign, schedule)).train()


@each_regularized
def test_gradients_it_makes_do_not_share_memory(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config(**STRONG[member.name]))
    effect.sgd(model).step()
    made = [parameter.grad for parameter in learning(model) if parameter.grad is not None]
    assert len({gradient.untyped_storage().data_ptr() for gradient in made}) == len(made) > 0


def test_what_the_user_has_frozen_does_not_move() -> None:
    model = get_peft_model(stack(), SORSAConfig(r=2, gamma=10.0, target_modules=["0"]))
    move(model, 0.1)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    frozen, other = (model.base_model.model[0].slots("default")[name] for name in ("right", "left"))
    frozen.requires_grad_(False)
    before, moved = frozen.clone(), other.clone()
    model(torch.randn(3, 24)).sum().backward()
    optimizer.step()
    assert torch.equal(frozen, before)
    assert not torch.equal(other, moved)


def test_a_penalty_may_be_a_number() -> None:
    @dataclass(repr=False)
    class Constant(SORSAConfig):
        def penalty(self, trained: Any) -> float:
            return 2.0

    model = get_peft_model(stack(), Constant(r=2, target_modules=["0", "2"]))
    assert penalty(model).item() == 2.0
    model(torch.randn(3, 24)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_optimisers_step_while_other_threads_make_models() -> None:
    model, done = get_peft_model(stack(), SORSAConfig(r=2, target_modules=["0"])), threading.Event()
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)

    def step() -> int:
        count = 0
        while not done.is_set():
            optimizer.step()
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        stepping = pool.submit(step)
        copies = [copy.deepcopy(model) for _ in range(40)]
        done.set()
        assert stepping.result()
    assert len(copies) == 40
