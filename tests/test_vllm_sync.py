"""What TRL sends to vLLM between steps of GRPO: merged weights under the base's names, and nothing of an adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from bases import load, logits, move
from members import FORMS, MEMBERS, Member
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from peft_kasa.adapter.starting import all_layers

each_form = pytest.mark.parametrize("member", FORMS, ids=str)


def sent(model: PeftModel) -> dict[str, Tensor]:
    """All that TRL's own walk over the model gives, in both of vLLM's modes; only no server takes it."""
    link = VLLMGeneration.__new__(VLLMGeneration)
    link.model, link._dist = model, DistributedBackend(Accelerator(cpu=True))
    return {name: value.clone() for name, value in link._iter_named_params()}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def adapted(member: Member, folder: str, kind: str, **given: object) -> PeftModel:
    """A model with an adapter away from its start."""
    model = get_peft_model(load(folder, kind), member.config(**given))
    move(model)
    return model


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(("member", "kind"), [(m, "fp32") for m in MEMBERS] + [(m, "bf16") for m in FORMS], ids=str)
def test_the_merged_weights_are_sent_and_then_taken_back(member: Member, kind: str, tiny: str) -> None:
    model = adapted(member, tiny, kind)
    before, expected = bits(model), bits(copy.deepcopy(model).merge_and_unload())
    assert_same(sent(model), expected)
    assert expected.keys() == bits(load(tiny, kind)).keys()
    assert_same(bits(model), before)
    assert not any(layer.merged for layer in all_layers(model))


@each_form
def test_every_sync_sends_the_weights_of_its_step(member: Member, tiny: str) -> None:
    model = adapted(member, tiny, "fp32")
    first, output = sent(model), logits(model)
    assert_same(sent(model), first)
    assert torch.equal(logits(model), output)
    move(model, seed=2)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(sent(model)[name], first[name])


@each_form
def test_a_trained_module_is_sent_in_place_of_the_original(member: Member, tiny: str) -> None:
    model = adapted(member, tiny, "fp32", modules_to_save=["lm_head"])
    found = sent(model)
    assert found.keys() == bits(load(tiny)).keys()
    assert torch.equal(found["lm_head.weight"], model.base_model.model.lm_head.modules_to_save["default"].weight)
    assert not torch.equal(found["lm_head.weight"], load(tiny).lm_head.weight)


@each_form
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_has_its_bits_back(member: Member, kind: str, tiny: str) -> None:
    model = adapted(member, tiny, kind)
    before, output = bits(model), logits(model.train(False))
    assert sent(model).keys() == bits(load(tiny, kind)).keys()
    assert torch.equal(logits(model), output)
    model.train()
    for layer in all_layers(model):
        layer.base.unpack()
    assert_same(bits(model), before)
