"""`inspect` of what its files say of experts and ranks: the numbers are the model's, or there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bases import fresh, move
from members import MEMBERS, VARIANTS, Member
from peft import get_peft_model
from test_experts import gpt_oss, mixtral

from peft_kasa import KaSAConfig, LoRAXSConfig, export_lora
from peft_kasa.adapter.starting import all_layers
from peft_kasa.report import inspect

STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def of_experts(base: Any, kind: Any = KaSAConfig, **given: Any) -> Any:
    """Experts whose patterns name the stacks, beside linear layers."""
    patterns = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"down_proj": 8}}
    config = {"r": 3, "target_modules": ["q_proj"], "target_parameters": STACKS, **patterns, **given}
    model = get_peft_model(base, kind(**config))
    move(model)
    return model


@pytest.mark.parametrize("base", [mixtral, gpt_oss])
@pytest.mark.parametrize(("kind", "given"), [(KaSAConfig, {}), (LoRAXSConfig, {"save_frames": False})])
def test_experts_have_their_own_ranks_and_norms(base: Any, kind: Any, given: dict[str, Any], tmp_path: Path) -> None:
    model = of_experts(base(), kind, **given)
    model.save_pretrained(tmp_path)
    layers = {layer.name: layer for layer in all_layers(model)}
    for beside in (None, base(), model):
        rows = inspect(tmp_path, beside).rows()
        assert len(rows) == len(layers) == 14
        for row in rows:
            layer = layers[row["module"].replace(".adapted", "")]
            assert row["rank"] == layer.adapters["default"].rank
            if beside is not None or not given:
                assert row["norm"] == pytest.approx(layer.lowrank("default").dense().norm().item(), rel=1e-4)
            if beside is not None:
                weight = layer.original().norm().item()
                assert row["relative_norm"] == pytest.approx(row["norm"] / weight, rel=1e-4)


def test_a_base_without_the_experts_is_refused(tmp_path: Path) -> None:
    of_experts(mixtral(), target_modules=[]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapted\.down_proj\.0: the base does not fit the adapter"):
        inspect(tmp_path, fresh())


def test_a_lora_of_stacks_is_refused(tmp_path: Path) -> None:
    export_lora(of_experts(mixtral()), tmp_path)
    with pytest.raises(ValueError, match="target_parameters has to be None"):
        inspect(tmp_path)


@pytest.mark.parametrize("frames", [True, False])
@pytest.mark.parametrize("member", [*MEMBERS, *VARIANTS], ids=str)
def test_a_config_with_another_rank_than_the_tensors_is_refused(member: Member, frames: bool, tmp_path: Path) -> None:
    driven = bool(member.config_class.needs)
    model = get_peft_model(fresh(), member.config(target_modules=["up_proj"], save_frames=frames or driven))
    model.save_pretrained(tmp_path)
    assert {row["rank"] for row in inspect(tmp_path).rows()} == {4}
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    for rank in (2, 8):
        path.write_text(json.dumps(fields | {"r": rank}))
        with pytest.raises(ValueError, match=r"up_proj: \w+ has to be of shape .* with the r and rank_pattern of"):
            inspect(tmp_path)
