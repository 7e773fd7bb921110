"""An adapter made from a file's config starts at its first forward pass, whatever that runs in: autocast, inference
mode, several threads. And updates are as exact within autocast as outside."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from bases import move, stack
from members import MEMBERS, Member
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_kasa import PiSSAConfig, SVFConfig
from peft_kasa.adapter.starting import all_layers

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def yet_to_start(config: Any) -> PeftModel:
    config.from_file = True
    return get_peft_model(stack(), config)


def slots(model: nn.Module) -> list[Tensor]:
    return [value for layer in all_layers(model) for value in layer.slots("default").values()]


@each_member
def test_it_starts_within_autocast_as_outside(member: Member) -> None:
    within, outside = (yet_to_start(member.config()) for _ in range(2))
    x = torch.randn(3, 24)
    with bfloat16():
        within(x)
    outside(x)
    assert all(map(torch.equal, slots(within), slots(outside)))


@each_member
def test_updates_are_exact_within_autocast(member: Member) -> None:
    model = get_peft_model(stack(), member.config())
    move(model, 1e-3)
    for layer in all_layers(model):
        exact = layer.get_delta_weight("default")
        with bfloat16():
            assert torch.equal(layer.get_delta_weight("default"), exact)


@each_member
def test_a_small_update_acts_within_autocast(member: Member) -> None:
    model = get_peft_model(stack(), member.config())
    move(model, 1e-3)
    layer = next(all_layers(model))
    names, x = ["default"], torch.randn(16, 24)
    wanted = layer.updated(torch.zeros(16, 12), x, names)
    with bfloat16(), torch.no_grad():
        found = layer.updated(torch.zeros(16, 12), x, names)
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_several_threads_may_be_first() -> None:
    x = torch.randn(3, 24)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            model = yet_to_start(PiSSAConfig(r=2, target_modules=["0", "2"]))
            wanted = get_peft_model(stack(), PiSSAConfig(r=2, target_modules=["0", "2"]))(x)
            for found in pool.map(model, [x] * 4):
                assert torch.equal(found, wanted)


def test_what_started_in_inference_mode_can_be_trained() -> None:
    def fresh() -> PeftModel:
        return yet_to_start(SVFConfig(target_modules=["0", "2"]))

    saved = {name: value for name, value in fresh().state_dict().items() if not name.endswith((".core0", ".right0"))}
    source = get_peft_model(stack(), SVFConfig(target_modules=["0", "2"])).state_dict()
    model = fresh()
    model.load_state_dict({name: source[name] for name in saved}, strict=False)
    with torch.inference_mode():
        model(torch.randn(2, 24))
    model.train()(torch.randn(2, 24)).sum().backward()
    assert all(value.grad is not None for value in slots(model) if value.requires_grad)
