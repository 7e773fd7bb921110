"""A product added to the base's result: the plain sum's values and gradients, whoever looks at the result besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import learning, load, move
from members import MEMBERS, Member
from peft import get_peft_model
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from peft_kasa import SpectralLinear
from peft_kasa.adapter.slots import Product
from peft_kasa.adapter.starting import all_layers

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)
each_shape = pytest.mark.parametrize("rows", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
SAVED = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def parts(rows: tuple[int, ...], full: bool) -> list[Tensor]:
    """x (..., 7), a result of the base (..., 6), and the factors of a product of rank 4."""
    core = [normal(4, 4, seed=4)] if full else []
    return [normal(*rows, 7, seed=0), normal(*rows, 6, seed=1), normal(6, 4, seed=2), normal(4, 7, seed=3), *core]


def added(x: Tensor, onto: Tensor, up: Tensor, down: Tensor, core: Tensor | None = None) -> Tensor:
    return Product(up, core, down)(x, onto)


def summed(x: Tensor, onto: Tensor, up: Tensor, down: Tensor, core: Tensor | None = None) -> Tensor:
    return onto + x @ (up @ down if core is None else up @ core @ down).T


def moved(member: Member, folder: str) -> SpectralLinear:
    """The first layer of the tiny model, trained a little."""
    model = get_peft_model(load(folder), member.config())
    move(model)
    return next(all_layers(model)).train()


def gradients(layer: SpectralLinear, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The output for (2, 3, 64), and the gradients of its square by the input and all that learns."""
    x = normal(2, 3, 64, seed=5, dtype=torch.float32)
    layer.zero_grad()
    (y := forward(x)).square().sum().backward()  # not torch.autograd.grad: reentrant checkpointing refuses it
    return [y.detach(), *(part.grad.clone() for part in (x, *learning(layer)))]  # type: ignore[union-attr]


@each_shape
@pytest.mark.parametrize("full", [False, True], ids=["folded", "core"])
def test_adding_gives_the_sums_values_and_gradients(rows: tuple[int, ...], full: bool) -> None:
    given = parts(rows, full)
    found, expected = added(*given), summed(*given)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    weight = normal(*rows, 6, seed=6).detach()
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), given) for y in (found, expected)), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


def test_adding_can_be_differentiated_twice_and_forwards() -> None:
    given = parts((3,), True)
    assert torch.autograd.gradgradcheck(added, given)
    tangents = [normal(*part.shape, seed=7).detach() for part in given]
    results = [torch.func.jvp(f, tuple(given), tuple(tangents)) for f in (added, summed)]
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_adding_keeps_the_dtype_of_what_it_adds_to(dtype: torch.dtype) -> None:
    """Quantised layers may answer in another dtype than the one of what they are given."""
    x, onto, up, down = (part.detach().float() for part in parts((2, 3), False))
    found = added(x, onto.to(dtype), up, down)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), summed(x, onto, up, down), atol=2e-2)


@each_member
def test_the_bases_result_is_not_written(member: Member, tiny: str) -> None:
    layer, seen = moved(member, tiny), []
    layer.base_layer.register_forward_hook(lambda *call: seen.append((call[-1], call[-1].clone())))
    layer(normal(2, 64, seed=5, dtype=torch.float32))
    assert all(torch.equal(result, copy) for result, copy in seen)


def selectively() -> Any:
    """Keeps matrix products, as policies in use do, and computes the rest again."""

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@each_member
@pytest.mark.parametrize(
    "how",
    [{"use_reentrant": False}, {"use_reentrant": True}, {"use_reentrant": False, "context_fn": selectively}],
    ids=["plain", "reentrant", "selective"],
)
def test_checkpointing_gives_the_same_gradients(member: Member, how: dict[str, Any], tiny: str) -> None:
    layer = moved(member, tiny)
    found = gradients(layer, lambda x: checkpoint(layer, x, **how))
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(layer, layer), strict=True))


@each_member
def test_functional_gradients_are_autograds(member: Member, tiny: str) -> None:
    layer = moved(member, tiny)
    x = normal(2, 3, 64, seed=5, dtype=torch.float32)
    found = torch.func.grad(lambda x: layer(x).square().sum())(x.detach())
    assert torch.allclose(found, gradients(layer, layer)[1], rtol=1e-5, atol=1e-5)
