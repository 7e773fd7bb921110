"""`from_lora`: a LoRA becomes an adapter of the family with the same update, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kasa import from_lora
from peft_kasa.adapter.starting import layers_of

EXACT = 1e-6  # of the update's norm: float32's own
PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"k_proj": 5}},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "a module in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
}
DISPLACED: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa of other ranks": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
}
REFUSED: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["0"]},
    "bias": {"bias": "all"},
    "target_parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 2)]},
    "lora_embedding_A": {"target_modules": ["embed_tokens"]},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
}


pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of what these tests are about


def saved(tiny: str, folder: Path, given: dict[str, Any], move: bool = True) -> Any:
    """A LoRA on the tiny model that has moved from its start, saved as `lora`, and as `initial` before that."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | given)
    model = get_peft_model(bases.load(tiny), config)
    model.save_pretrained(str(folder / "initial"))
    if move:
        bases.move(model)
    model.save_pretrained(str(folder / "lora"))
    return model


def effective(model: Any, tiny: str) -> dict[str, Tensor]:
    """What a PEFT model's weights differ by from the original base's, by module; what it has changed in them, too."""
    whole = {
        name: module.weight.detach() for name, module in model.merge_and_unload().named_modules() if linear(module)
    }
    return {
        name: whole[name] - module.weight.detach()
        for name, module in bases.load(tiny).named_modules()
        if linear(module)
    }


def linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def updates(model: Any) -> dict[str, Tensor]:
    return {layer.name: layer.get_delta_weight("default") for layer in layers_of(model, "default")}


@pytest.mark.parametrize("given", PLAIN.values(), ids=PLAIN)
def test_a_plain_lora_is_the_same_update(given: dict[str, Any], tiny: str, tmp_path: Path) -> None:
    theirs = saved(tiny, tmp_path, given)
    ours = from_lora(bases.load(tiny), tmp_path / "lora")
    for name, update in updates(ours).items():
        expected = theirs.base_model.model.get_submodule(name).get_delta_weight("default")
        assert (update - expected).norm() <= EXACT * expected.norm()
    assert torch.allclose(bases.logits(ours), bases.logits(theirs), rtol=1e-6, atol=1e-5)
    assert ours.peft_config["default"].method == "eva"


@pytest.mark.parametrize("given", DISPLACED.values(), ids=DISPLACED)
def test_what_belongs_to_a_residual_base_moves_to_the_original(
    given: dict[str, Any], tiny: str, tmp_path: Path
) -> None:
    """PEFT has taken the start out of the base: the update on the original one is s (B A - B0 A0)."""
    theirs = saved(tiny, tmp_path, given)
    expected_logits = bases.logits(theirs)
    for initial in (None, tmp_path / "initial"):
        ours = from_lora(bases.load(tiny), tmp_path / "lora", initial)
        assert torch.allclose(bases.logits(ours), expected_logits, rtol=1e-5, atol=5e-5)
    expected = effective(theirs, tiny)
    for name, update in updates(ours).items():
        assert (update - expected[name]).norm() <= 2e-5 * expected[name].norm()  # theirs is a difference of weights


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_peft_s_own_conversion_is_the_same(start: str, tiny: str, tmp_path: Path) -> None:
    """`path_initial_model_for_weight_conversion` gives a plain LoRA of twice the rank."""
    theirs = saved(tiny, tmp_path, {"init_lora_weights": start})
    before = bases.logits(theirs)
    theirs.save_pretrained(str(tmp_path / "both"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ours = from_lora(bases.load(tiny), tmp_path / "both")
    assert ours.peft_config["default"].method == "eva"
    assert torch.allclose(bases.logits(ours), before, rtol=1e-5, atol=5e-5)


def test_a_random_start_needs_the_adapter_as_it_began(tiny: str, tmp_path: Path) -> None:
    theirs = saved(tiny, tmp_path, {"init_lora_weights": "pissa_niter_4"})
    expected = bases.logits(theirs)
    with pytest.raises(ValueError, match="pissa_niter_4"):
        from_lora(bases.load(tiny), tmp_path / "lora")
    ours = from_lora(bases.load(tiny), tmp_path / "lora", initial=tmp_path / "initial")
    assert torch.allclose(bases.logits(ours), expected, rtol=1e-5, atol=5e-5)


def test_a_start_that_has_not_moved_is_the_base(tiny: str, tmp_path: Path) -> None:
    saved(tiny, tmp_path, {"init_lora_weights": "pissa"}, move=False)
    ours = from_lora(bases.load(tiny), tmp_path / "lora")
    assert torch.equal(bases.logits(ours), bases.logits(bases.load(tiny)))


@pytest.mark.parametrize("given", [PLAIN["patterns"], PLAIN["a module in full"], DISPLACED["pissa"]], ids=str)
def test_the_adapter_is_one_like_any_other(given: dict[str, Any], tiny: str, tmp_path: Path) -> None:
    """It is saved, loaded bit for bit, learns, and leaves the base as it was."""
    saved(tiny, tmp_path, given)
    ours = from_lora(bases.load(tiny), tmp_path / "lora")
    ours.save_pretrained(str(tmp_path / "ours"))
    again = PeftModel.from_pretrained(bases.load(tiny), str(tmp_path / "ours"), is_trainable=True)
    assert torch.equal(bases.logits(again), bases.logits(ours))
    bases.steps(again)
    assert not torch.equal(bases.logits(again), bases.logits(ours))
    with again.disable_adapter():
        assert torch.equal(bases.logits(again), bases.logits(bases.load(tiny)))


@pytest.mark.parametrize(("named", "given"), REFUSED.items(), ids=list(REFUSED))
def test_what_is_no_such_product_is_refused_by_name(
    named: str, given: dict[str, Any], tiny: str, tmp_path: Path
) -> None:
    base: nn.Module = bases.stack() if named == "lora_bias" else bases.load(tiny)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | given)
    get_peft_model(base, config).save_pretrained(str(tmp_path / "lora"))  # type: ignore[arg-type]
    fresh = bases.load(tiny)
    with pytest.raises(ValueError, match=named):
        from_lora(fresh, tmp_path / "lora")
    assert not hasattr(fresh, "peft_config")


def test_a_field_of_tomorrow_is_refused_by_name(tiny: str, tmp_path: Path) -> None:
    """A variant that PEFT adds one day says so in a field that is not its default."""
    saved(tiny, tmp_path, {})
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"arrow_config": {"top_k": 2}}))
    with pytest.raises(ValueError, match="arrow_config"):
        from_lora(bases.load(tiny), tmp_path / "lora")


def test_what_does_not_fit_leaves_the_base_alone(tiny: str, tmp_path: Path) -> None:
    """A tensor is missing, or the base is another."""
    saved(tiny, tmp_path, {"target_modules": ["q_proj"]})
    base = bases.load(tiny)
    before = bases.logits(base)
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj", "k_proj"]}))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_proj: the LoRA's file lacks"):
        from_lora(base, tmp_path / "lora")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["layers.0.self_attn.q_proj"]}))
    with pytest.raises(ValueError, match="nothing takes this tensor"):
        from_lora(base, tmp_path / "lora")
    assert not hasattr(base, "peft_config")
    assert torch.equal(bases.logits(base), before)


def test_a_model_with_adapters_is_no_base(tiny: str, tmp_path: Path) -> None:
    model = get_peft_model(bases.load(tiny), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"model has to be a base model.*unload\(\).* Found 'PeftModel"):
        from_lora(model, tmp_path, adapter="second")


def test_an_error_takes_back_all_that_was_made(tmp_path: Path) -> None:
    """What learns and modules_to_save too."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))

    lora: Any = get_peft_model(model(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    lora.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: value for key, value in tensors.items() if "lora" in key}, tmp_path / "adapter_model.safetensors")
    base = model()
    with pytest.raises(ValueError, match=r"The LoRA's file lacks .*1\.weight"):
        from_lora(base, tmp_path)
    assert [type(module) for module in base] == [nn.Linear, nn.Linear]
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_model_that_peft_cannot_wrap_stays_as_it_was(tiny: str, tmp_path: Path) -> None:
    """PEFT's class for causal language models asks for what a model without its head lacks, once all is wrapped."""
    saved(tiny, tmp_path, {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"})
    body = bases.load(tiny).model
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        from_lora(body, tmp_path / "lora")
    assert all(linear(layer.self_attn.q_proj) for layer in body.layers)
    assert all(parameter.requires_grad for parameter in body.parameters())
    assert not hasattr(body, "peft_config")


def test_transposed_and_quantised_bases(tiny: str, tmp_path: Path) -> None:
    """Conv1D keeps its weight the other way round; a 4-bit base has the update on what it dequantises to."""
    torch.manual_seed(0)
    layer = Conv1D(6, 8)
    turned = nn.Sequential(layer)
    lora = get_peft_model(turned, LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True))  # type: ignore[arg-type]
    bases.move(lora)
    x = torch.randn(3, 8)
    expected = lora.eval()(x)
    lora.save_pretrained(str(tmp_path / "turned"))
    assert torch.allclose(from_lora(lora.unload(), tmp_path / "turned").eval()(x), expected, atol=1e-6)

    lora = get_peft_model(bases.load(tiny, "nf4"), LoraConfig(r=4, target_modules=["q_proj"]))
    bases.move(lora)
    lora.save_pretrained(str(tmp_path / "four"))
    ours = from_lora(bases.load(tiny, "nf4"), tmp_path / "four").train()
    ids = bases.tokens()
    assert torch.allclose(ours(input_ids=ids).logits, lora.train()(input_ids=ids).logits, atol=1e-5)
