"""A refused adapter leaves the model as it was: nothing wrapped, and what learnt learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bases import fresh, logits, move
from peft import PeftModel, get_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from peft_kasa import PiSSAConfig
from peft_kasa.adapter.experts.wrapper import SpectralExperts
from peft_kasa.adapter.layer import SpectralLinear

BEYOND: dict[str, Any] = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [1, 2]}}
WRAPPERS = (SpectralLinear, SpectralExperts, AuxiliaryTrainingWrapper)


def config(**given: Any) -> PiSSAConfig:
    return PiSSAConfig(**{"r": 4, "target_modules": ["q_proj"], **given})


def other() -> nn.Module:
    """Another base, of which one parameter does not learn."""
    base = fresh()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter))
    base.model.norm.weight.requires_grad_(False)
    return base


def facts(model: nn.Module) -> dict[str, Any]:
    """What there is to restore."""
    return {
        "learns": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "wrapped": [path for path, module in model.named_modules() if isinstance(module, WRAPPERS)],
        "config": getattr(model, "peft_config", None),
    }


def saved(folder: Path, **given: Any) -> Any:
    model = get_peft_model(fresh(), config(**given))
    move(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("given", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str)
@pytest.mark.parametrize("beyond", [{}, BEYOND], ids=["updates", "beyond"])
def test_a_refused_file_leaves_the_base_as_it_was(beyond: Any, given: Any, tmp_path: Path) -> None:
    trained, base = logits(saved(tmp_path, **beyond)), other()
    before, plain = facts(base), logits(base)
    with pytest.raises(ValueError, match="was trained on another weight"):
        PeftModel.from_pretrained(base, tmp_path, **given)
    assert facts(base) == before
    assert torch.equal(logits(base), plain)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), tmp_path, **given)), trained)


def test_a_file_without_a_module_is_refused_in_words(tmp_path: Path) -> None:
    saved(tmp_path, **BEYOND)
    path, base = tmp_path / "adapter_model.safetensors", fresh()
    kept = {key: value for key, value in load_file(path).items() if "lm_head" not in key}
    save_file(kept, path, metadata={"format": "pt"})
    before = facts(base)
    with pytest.raises(ValueError, match=r"the adapter's file lacks base_model\.model\.lm_head\.weight"):
        PeftModel.from_pretrained(base, tmp_path)
    assert facts(base) == before


def test_a_refused_second_adapter_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    saved(tmp_path, **BEYOND)
    model = get_peft_model(other(), config(target_modules=["k_proj"], **BEYOND))
    move(model)
    before, trained = facts(model), logits(model)
    with pytest.raises(ValueError, match="was trained on another weight"):
        model.load_adapter(str(tmp_path), "second")
    assert facts(model) == before
    assert torch.equal(logits(model), trained)


def test_a_refused_start_takes_the_modules_trained_in_full_out_again() -> None:
    base = fresh()
    with torch.no_grad():
        base.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    before = facts(base)
    with pytest.raises(ValueError, match="1 NaN or infinite entries"):
        get_peft_model(base, config(**BEYOND))
    assert facts(base) == before


def test_an_adapter_on_the_same_base_again_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    base = saved(tmp_path / "first", target_modules=["q_proj", "down_proj"]).get_base_model()
    model = get_peft_model(base, config())
    move(model, seed=2)
    assert not any(isinstance(module, SpectralLinear) for layer in base.model.layers for module in layer.mlp.modules())
    model.save_pretrained(tmp_path / "second")
    trained = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), tmp_path / "second")), trained)
    base = PeftModel.from_pretrained(fresh(), tmp_path / "first").get_base_model()
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "second")), trained)
