"""torch.compile: one graph, eager's numbers, and never a result of an adapter that is no longer active."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import learning, load, logits, move, tokens
from members import FORMS, MEMBERS, VARIANTS, Member
from peft import PeftModel, get_peft_model
from test_regularisers import DATA
from test_trainers import SHORT
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

from peft_kasa import SpectralLinear, penalty
from peft_kasa.adapter.starting import all_layers

each_member = pytest.mark.parametrize("member", MEMBERS + VARIANTS, ids=str)
QUANTIZED = [member for member in MEMBERS if member.name in ("kasa", "pissa", "svf")]


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def whole(module: nn.Module, backend: str = "aot_eager") -> Callable[..., Any]:
    """The module compiled; an error where that takes more than one graph."""
    return torch.compile(module, backend=backend, fullgraph=True)


def graphs() -> int:
    """How many graphs have been compiled."""
    return counters["stats"]["unique_graphs"]


def adapted(member: Member, folder: str, kind: str = "fp32", **given: Any) -> PeftModel:
    """A model with an adapter away from its start."""
    model = get_peft_model(load(folder, kind), member.config(**given))
    move(model)
    return model


def first(model: nn.Module) -> SpectralLinear:
    return next(all_layers(model))


def inputs(seed: int = 0, rows: int = 3) -> Tensor:
    """Of the first layer of the tiny model: (rows, 64)."""
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module, forward: Callable[..., Any]) -> list[Tensor]:
    """The output, and the gradients of its square by the input and by all that learns."""
    x = inputs().requires_grad_()
    y = forward(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *learning(module)])]


def losses(model: nn.Module, forward: Callable[..., Any]) -> list[Tensor]:
    """The loss, and its gradients by all that learns."""
    loss = forward(input_ids=tokens(), labels=tokens()).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(learning(model)))]


def assert_same(found: list[Tensor], expected: list[Tensor], bound: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= bound * b.norm() + 1e-12


@each_member
def test_a_layer_is_one_graph_forwards_and_backwards(member: Member, tiny: str) -> None:
    layer = first(adapted(member, tiny)).train()
    compiled = whole(layer)
    assert_same(gradients(layer, compiled), gradients(layer, layer))
    assert graphs() == 1


@pytest.mark.parametrize("member", QUANTIZED, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_layer_on_a_quantised_base_is_one_graph(member: Member, kind: str, tiny: str) -> None:
    layer = first(adapted(member, tiny, kind))
    for training in (True, False):
        compiled = whole(layer.train(training))
        assert_same(gradients(layer, compiled), gradients(layer, layer))
    assert graphs() == 2


@pytest.mark.parametrize("member", FORMS, ids=str)
def test_a_model_is_one_graph_that_follows_its_training(member: Member, tiny: str) -> None:
    model = load(tiny)
    model.model.layers = model.model.layers[:1]
    model = get_peft_model(model, member.config()).train()
    compiled, optimizer = whole(model), torch.optim.SGD(learning(model), lr=1e-2)
    seen = []
    for _ in range(3):
        loss, *found = losses(model, compiled)
        assert_same([loss, *found], losses(model, model))
        for parameter, gradient in zip(learning(model), found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        seen.append(loss.item())
    assert seen == sorted(seen, reverse=True)
    assert graphs() == 1


@pytest.mark.parametrize("member", FORMS, ids=str)
def test_dropout_is_one_graph(member: Member, tiny: str) -> None:
    layer = first(adapted(member, tiny, dropout=0.5))
    compiled = whole(layer.train())
    assert not torch.equal(compiled(inputs()), compiled(inputs()))
    assert torch.equal(whole(layer.eval())(inputs()), layer(inputs()))


@pytest.mark.parametrize("member", FORMS, ids=str)
def test_switching_adapters_gives_no_stale_result(member: Member, tiny: str) -> None:
    model = adapted(member, tiny)
    model.add_adapter("other", MEMBERS[0].config(seed=5))
    layer, x, seen = first(model).eval(), inputs(), []
    compiled = whole(layer)

    def check() -> None:
        with torch.no_grad():
            seen.append(compiled(x))
            assert torch.allclose(seen[-1], layer(x), atol=1e-6)

    check()
    model.set_adapter("other")
    check()
    model.base_model.set_adapter(["default", "other"])
    check()
    with model.disable_adapter():
        check()
        assert torch.equal(seen[-1], layer.base_layer(x))
    model.set_adapter("default")
    check()
    assert torch.equal(seen[0], seen[-1])
    assert all(not torch.allclose(a, b, atol=1e-6) for a, b in pairwise(seen))
    model.delete_adapter("other")
    check()


@pytest.mark.parametrize("member", FORMS, ids=str)
def test_merging_gives_no_stale_result(member: Member, tiny: str) -> None:
    layer = first(adapted(member, tiny)).eval()
    compiled = whole(layer)
    before = compiled(inputs())
    layer.merge()
    merged = compiled(inputs())
    assert torch.equal(merged, layer.base_layer(inputs()))
    assert torch.allclose(merged, before, atol=1e-4)
    layer.unmerge()
    assert torch.equal(compiled(inputs()), before)


@pytest.mark.parametrize("member", FORMS, ids=str)
def test_other_lengths_compile_once_more_at_most(member: Member, tiny: str) -> None:
    layer = first(adapted(member, tiny)).eval()
    compiled = whole(layer)
    for rows in range(3, 9):
        assert torch.allclose(compiled(inputs(rows=rows)), layer(inputs(rows=rows)), atol=1e-6)
    assert graphs() == 2  # one for the first, one for any


def test_an_adapter_that_is_still_to_be_checked_is_one_graph_once_it_was(tiny: str, tmp_path: Path) -> None:
    """A file loaded with low_cpu_mem_usage is checked at first use: `penalty` is one, the first call another."""
    model = adapted(MEMBERS[0], tiny)
    model.save_pretrained(str(tmp_path))
    expected = first(model)(inputs())
    for use in (lambda again: torch.compile(first(again), backend="aot_eager")(inputs()), penalty):
        again = PeftModel.from_pretrained(load(tiny), str(tmp_path), low_cpu_mem_usage=True)
        use(again)
        assert torch.allclose(whole(first(again))(inputs()), expected, atol=1e-6)


def fit(model: nn.Module, folder: Path, **given: Any) -> list[Tensor]:
    """Trains in transformers' Trainer: the losses of four steps, and all that learns."""
    trainer = Trainer(model, TrainingArguments(str(folder), **{**SHORT, "max_steps": 4} | given), train_dataset=DATA)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [torch.tensor(losses), *(parameter.detach() for parameter in learning(model))]


def compiled(backend: str) -> dict[str, Any]:
    return {"torch_compile": True, "torch_compile_backend": backend}


@pytest.mark.parametrize("member", FORMS, ids=str)
def test_trainer_with_torch_compile_trains_as_without(member: Member, tiny: str, tmp_path: Path) -> None:
    def model() -> PeftModel:
        base = load(tiny)
        base.model.layers = base.model.layers[:1]
        return get_peft_model(base, member.config())

    assert_same(fit(model(), tmp_path, **compiled("aot_eager")), fit(model(), tmp_path))
    assert graphs() == 1
    assert not counters["graph_break"]


@pytest.mark.real
@pytest.mark.parametrize("member", FORMS, ids=str)
def test_trainer_with_inductor_trains_as_without(member: Member, tiny: str, tmp_path: Path) -> None:
    eager = fit(adapted(member, tiny), tmp_path)
    assert_same(fit(adapted(member, tiny), tmp_path, **compiled("inductor")), eager)
    assert graphs() == 1
    assert not counters["graph_break"]


@pytest.mark.real
@pytest.mark.parametrize("kind", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("member", QUANTIZED[:1], ids=str)
def test_inductor_gives_a_model_eagers_numbers(member: Member, kind: str, tiny: str) -> None:
    model = adapted(member, tiny, kind).train()
    assert_same(losses(model, whole(model, "inductor")), losses(model, model), 1e-4)
    expected = logits(model.eval())  # before it is compiled: bitsandbytes repacks 4-bit weights in the first evaluation
    with torch.no_grad():
        assert torch.allclose(whole(model, "inductor")(input_ids=tokens()).logits, expected, atol=1e-4)


@pytest.mark.real
@pytest.mark.parametrize("kind", ["fp32", "nf4", "int8"])
@pytest.mark.parametrize("member", FORMS, ids=str)
def test_inductor_gives_eagers_numbers(member: Member, kind: str, tiny: str) -> None:
    layer = first(adapted(member, tiny, kind)).train()
    assert_same(gradients(layer, whole(layer, "inductor")), gradients(layer, layer))
