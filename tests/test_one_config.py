"""One config object for several adapters: what one of them is told is not the others' business."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bases import Scored, stack
from members import MEMBERS, Member
from peft import PeftModel, get_peft_model

from peft_kasa import EVAConfig, PiSSAConfig, SpectralConfig, calibrate
from peft_kasa.adapter.starting import all_layers

DRIVEN = [member for member in MEMBERS if member.config_class.needs]


def rows(scale: float = 1.0) -> list[dict[str, torch.Tensor]]:
    """Inputs of 16 sequences; but for two of their features they are of this scale."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([1.0] * 2 + [scale] * 22)
    return [{"input": torch.randn(1, 8, 24, generator=generator) * sizes} for _ in range(16)]


def wrapped(config: SpectralConfig) -> Any:
    return get_peft_model(Scored(*stack()), config)


def ranks(model: Any) -> dict[str, int]:
    return {layer.name: layer.adapters["default"].rank for layer in all_layers(model)}


def test_ranks_that_one_model_chooses_are_not_the_others(tmp_path: Path) -> None:
    config = EVAConfig(r=2, target_modules=["0", "2", "4"])
    one, other = wrapped(config), wrapped(config)
    calibrate(one, rows())
    chosen = ranks(one)
    calibrate(other, rows(1e-5))
    assert ranks(other) != chosen
    for index, model in enumerate((one, other)):
        assert model.peft_config["default"].rank_pattern == ranks(model)
        model.save_pretrained(tmp_path / str(index))
        again = PeftModel.from_pretrained(Scored(*stack()), tmp_path / str(index))
        assert ranks(again) == ranks(model)


def test_statistics_that_a_shared_config_has_are_shared_too() -> None:
    """They may be large, and are never written."""
    config = EVAConfig(r=2, target_modules=["0", "2", "4"], rank_budget=None)
    statistics = calibrate(Scored(*stack()), rows(), config)
    one, other = wrapped(config), wrapped(config)
    assert one.peft_config["default"] is not other.peft_config["default"]
    assert one.peft_config["default"].statistics is other.peft_config["default"].statistics is statistics


@pytest.mark.parametrize("member", DRIVEN, ids=str)
def test_statistics_of_one_model_do_not_start_another(member: Member) -> None:
    config = member.config(statistics=None, r=2, target_modules=["0", "2", "4"])
    one, other = wrapped(config), wrapped(config)
    calibrate(one, rows())
    with pytest.raises(ValueError, match="has seen none"):
        other(**rows()[0])


def test_the_first_adapter_has_the_users_own_config() -> None:
    config = PiSSAConfig(r=2, target_modules=["0"])
    one = wrapped(config)
    one.add_adapter("second", config)
    assert one.peft_config["default"] is config
    assert one.peft_config["second"] is not config
    assert one.peft_config["second"] == config
