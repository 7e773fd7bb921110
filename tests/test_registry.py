"""The registry of methods: what a subclass of a config does to it."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from peft_kasa import KaSAConfig, SORSAConfig
from peft_kasa.methods import registry, sorsa
from peft_kasa.methods.method import methods


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", methods())


def test_a_subclass_without_a_name_leaves_the_method_to_its_class(tmp_path: Path) -> None:
    @dataclass(repr=False)
    class TunedConfig(SORSAConfig):
        gamma: float = 0.5

    assert methods()["sorsa"] is SORSAConfig
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), TunedConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    found = PeftConfig.from_pretrained(tmp_path)
    assert type(found) is SORSAConfig
    assert found.gamma == 0.5


def test_a_subclass_that_is_read_back_with_another_scale_is_warned_of(tmp_path: Path) -> None:
    class HalvedConfig(SORSAConfig):
        default_scale = 0.5

    class NamedConfig(HalvedConfig):
        name = "test_named"

    with pytest.warns(UserWarning, match=r"HalvedConfig: .* a SORSAConfig, whose default_scale is another.*`name`"):
        HalvedConfig(r=2).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NamedConfig(r=2).save_pretrained(tmp_path)
        SORSAConfig(r=2).save_pretrained(tmp_path)


def test_a_name_of_this_package_is_refused() -> None:
    with pytest.raises(TypeError, match=r"OwnConfig: name has to be none of this .* Found 'kasa', which is KaSAConfig"):

        @dataclass(repr=False)
        class OwnConfig(SORSAConfig):
            name = "kasa"

    assert methods()["kasa"] is KaSAConfig


def test_of_other_classes_the_last_of_a_name_wins() -> None:
    for _ in range(2):

        @dataclass(repr=False)
        class OwnConfig(SORSAConfig):
            name = "test_own"

        assert methods()["test_own"] is OwnConfig


def test_a_module_of_this_package_may_be_loaded_again() -> None:
    module = importlib.util.module_from_spec(sorsa.__spec__)  # type: ignore[attr-defined, arg-type]
    sorsa.__spec__.loader.exec_module(module)  # type: ignore[union-attr]
    assert methods()["sorsa"] is module.SORSAConfig is not SORSAConfig
    assert torch.equal(module.SORSAConfig(r=2).core(torch.ones(2), None, 2), torch.ones(2))
