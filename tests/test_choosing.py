"""Which of several adapters act: after one is deleted, where a name is wrong, and where it is said twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases import fresh, logits, move
from peft import get_peft_model

from peft_kasa import PiSSAConfig
from peft_kasa.adapter.starting import all_layers

TARGETS = {"default": ["q_proj"], "second": ["q_proj", "k_proj"], "third": ["v_proj"]}


def several() -> Any:
    """Three adapters on overlapping layers, the first active."""
    model = get_peft_model(fresh(), PiSSAConfig(r=2, target_modules=TARGETS["default"]))
    for name in ("second", "third"):
        model.add_adapter(name, PiSSAConfig(r=2, target_modules=TARGETS[name]))
    for name in ("third", "second", "default"):
        model.set_adapter(name)
        move(model)
    return model


def active(model: Any) -> set[tuple[str, ...]]:
    """What is active in the layers and, as PEFT sees it, in the model."""
    return {tuple(layer.active_adapters) for layer in all_layers(model)} | {tuple(model.active_adapters)}


def test_where_the_active_adapter_is_deleted_all_layers_go_on_with_the_same() -> None:
    model = several()
    model.set_adapter("second")
    second = logits(model)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert active(model) == {("second",)}
    assert torch.equal(logits(model), second)
    learning = {
        name.split(".peft_kasa_learnt.")[1][:6] for name, value in model.named_parameters() if value.requires_grad
    }
    assert learning == {"second"}


def test_the_others_of_several_active_ones_stay_active() -> None:
    model = several()
    model.set_adapter("third")
    third = logits(model)
    model.base_model.set_adapter(["default", "third"])
    model.delete_adapter("default")
    assert active(model) == {("third",)}
    assert torch.equal(logits(model), third)


def test_an_unknown_name_is_refused_before_anything_is_set() -> None:
    model = several()
    for names in ("thrid", ["default", "thrid"]):
        with pytest.raises(ValueError, match=r"adapter_names have to be of \['default', 'second', 'third'\].*thrid"):
            model.base_model.set_adapter(names)
    assert active(model) == {("default",)}


def test_a_name_said_twice_acts_once_as_it_is_merged_once() -> None:
    model = several()
    once = logits(model)
    model.base_model.set_adapter(["default", "default"])
    assert torch.equal(logits(model), once)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), once, atol=1e-5, rtol=1e-4)


def test_an_adapter_without_a_name_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"An adapter's name may not be .* Found ''"):
        get_peft_model(fresh(), PiSSAConfig(r=2, target_modules=["q_proj"]), adapter_name="")
