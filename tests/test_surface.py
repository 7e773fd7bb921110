"""What else of LoraConfig users set: biases, targets, tied weights, and models that are no plain decoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from bases import fresh, learning, load, logits, move, steps
from members import FORMS, VARIANTS, Member
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from peft_kasa import KaSAConfig, PiSSAConfig, export_lora

each_form = pytest.mark.parametrize("member", FORMS, ids=str)
BIASES = ["all", "peft_kasa_only"]


def gpt2() -> GPT2LMHeadModel:
    """Conv1D layers with biases, and tied embeddings."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2, **ids)
    return GPT2LMHeadModel(config).eval()


def tied() -> LlamaForCausalLM:
    """The tests' Llama, with one matrix at both ends."""
    config = fresh().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() < 1e-5 * expected.norm())


# Biases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
@each_form
def test_biases_learn_and_come_back(bias: str, member: Member, tmp_path: Path) -> None:
    model = get_peft_model(gpt2(), member.config_class(r=2, target_modules=["c_attn", "c_fc"], bias=bias))
    names = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert len(names) == {"all": len([n for n, _ in gpt2().named_parameters() if n.endswith("bias")])}.get(bias, 4)
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    steps(model)
    assert not any(torch.equal(model.get_parameter(name), before[name]) for name in names)
    trained = logits(model)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(gpt2(), str(tmp_path), is_trainable=True)
    assert torch.equal(logits(again), trained)
    assert {name for name, p in again.named_parameters() if p.requires_grad and name.endswith("bias")} == names
    assert close(logits(again.merge_and_unload()), trained)


@pytest.mark.parametrize("bias", BIASES)
def test_every_loader_brings_the_biases(bias: str, tmp_path: Path) -> None:
    config = PiSSAConfig(r=2, target_modules=["c_attn"], bias=bias)
    model = gpt2()
    model.add_adapter(config)
    move(model)
    model.save_pretrained(str(tmp_path))
    again, other = gpt2(), inject_adapter_in_model(config, gpt2())
    again.load_adapter(str(tmp_path))
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    for found in (again, other, PeftModel.from_pretrained(gpt2(), str(tmp_path), low_cpu_mem_usage=True)):
        assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize("bias", BIASES)
def test_biases_leave_in_a_lora_for_peft_and_not_for_servers(bias: str, tmp_path: Path) -> None:
    model = get_peft_model(gpt2(), KaSAConfig(r=2, target_modules=["c_attn"], bias=bias))
    move(model)
    with pytest.raises(ValueError, match=r"also trains \['biases'\].*uniform=False"):
        export_lora(model, tmp_path)
    export_lora(model, tmp_path, uniform=False)
    again = PeftModel.from_pretrained(gpt2(), str(tmp_path))
    assert isinstance(again.peft_config["default"], LoraConfig)
    assert close(logits(again), logits(model))


def test_a_file_without_its_biases_is_refused(tmp_path: Path) -> None:
    get_peft_model(gpt2(), PiSSAConfig(r=2, target_modules=["c_attn"])).save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace('"bias": "none"', '"bias": "peft_kasa_only"'))
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn\.base_layer\.bias: the adapter's file lacks this bias"):
        PeftModel.from_pretrained(gpt2(), str(tmp_path))


def test_two_adapters_do_not_share_biases() -> None:
    model = get_peft_model(gpt2(), PiSSAConfig(r=2, target_modules=["c_attn"], bias="all"))
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("second", PiSSAConfig(r=2, target_modules=["c_attn"], bias="all"))
    with pytest.raises(ValueError, match="tokens or biases, which are no updates that add up"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


# Targets ----------------------------------------------------------------------------------------------------------

CHOSEN = [
    ({"target_modules": r".*layers\.1\..*(q|v)_proj"}, ["1.self_attn.q_proj", "1.self_attn.v_proj"]),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        ["1.self_attn.q_proj"],
    ),
    ({"target_modules": ["layers.1.self_attn.q_proj"], "layers_pattern": []}, ["1.self_attn.q_proj"]),
    (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*v_proj"},
        ["0.self_attn.q_proj", "1.self_attn.q_proj"],
    ),
]


@pytest.mark.parametrize(("given", "expected"), CHOSEN, ids=["regex", "layers", "no pattern", "excluded"])
def test_targets_are_those_that_lora_takes(given: dict[str, object], expected: list[str]) -> None:
    model = get_peft_model(fresh(), KaSAConfig(r=2, **given))
    assert model.targeted_module_names == [f"model.layers.{name}" for name in expected]
    assert get_peft_model(fresh(), LoraConfig(r=2, **given)).targeted_module_names == model.targeted_module_names


REFUSED = [
    (
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        "layers_to_transform needs target_modules as a list",
    ),
    ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    ({"target_parameters": "experts.down_proj"}, r"target_parameters has to be a list of names.*Found 'experts"),
    ({"bias": "lora_only"}, "bias has to be 'none' or 'all' or 'peft_kasa_only'. Found 'lora_only'"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_would_have_no_effect_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KaSAConfig(r=2, **given)


@pytest.mark.parametrize("layer", [nn.Embedding(8, 4), nn.Conv1d(3, 4, 2), nn.Conv2d(3, 4, 2)], ids=repr)
def test_other_layers_are_refused_by_name(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(TypeError, match=rf"1: {type(layer).__name__} is not a linear layer. Choose Linear, Conv1D"):
        get_peft_model(model, KaSAConfig(r=2, target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear


def test_rslora_follows_the_patterns() -> None:
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 6}}
    config = KaSAConfig(r=9, alpha=12, use_rslora=True, target_modules=["q_proj", "v_proj"], **patterns)
    attention = get_peft_model(fresh(), config).base_model.model.model.layers[0].self_attn
    assert attention.q_proj.adapters["default"].scale == pytest.approx(6 / 4**0.5)
    assert attention.v_proj.adapters["default"].scale == pytest.approx(12 / 9**0.5)


# GPT-2 and tied weights -------------------------------------------------------------------------------------------


@each_form
def test_gpt2_converts_exactly(member: Member, tmp_path: Path) -> None:
    model = get_peft_model(gpt2(), member.config_class(r=2, target_modules=["c_attn", "c_fc"]))
    losses = steps(model)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    trained = logits(model)
    report = export_lora(model, tmp_path / "ours")
    assert close(logits(PeftModel.from_pretrained(gpt2(), str(tmp_path / "ours"))), trained)
    lora, tensors = convert_to_lora(model, rank=report.rank)
    theirs = get_peft_model(gpt2(), lora)
    set_peft_model_state_dict(theirs, tensors)
    assert close(logits(theirs), trained)
    assert close(logits(model.merge_and_unload()), trained)


TIED = [
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    {"trainable_token_indices": [1, 2, 3]},
]


@pytest.mark.parametrize("given", TIED, ids=str)
def test_tied_weights_stay_tied(given: dict[str, object], tmp_path: Path) -> None:
    model = get_peft_model(tied(), KaSAConfig(r=2, target_modules=["q_proj"], **given))
    assert len([p for p in learning(model) if p.shape in ((64, 64), (3, 64))]) == 1  # for both ends
    steps(model)
    trained = logits(model)
    model.save_pretrained(str(tmp_path / "ours"))
    assert torch.equal(logits(PeftModel.from_pretrained(tied(), str(tmp_path / "ours"))), trained)
    export_lora(model, tmp_path / "lora", uniform=False)
    assert close(logits(PeftModel.from_pretrained(tied(), str(tmp_path / "lora"))), trained)
    merged = model.merge_and_unload()
    assert close(logits(merged), trained)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


# Offloaded bases --------------------------------------------------------------------------------------------------


def offloaded(tiny: str, folder: Path) -> LlamaForCausalLM:
    """The tiny model with its second layer on disk."""
    here = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys(here, "cpu") | {"model.layers.1": "disk"}
    model = LlamaForCausalLM.from_pretrained(
        tiny, device_map=places, offload_folder=folder / "off", dtype=torch.float32
    )
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    return model.eval()


PLACES = {
    "disk": offloaded,
    "cpu": lambda tiny, _: cpu_offload(load(tiny), execution_device=torch.device("cpu")),
}
THROUGH_BASE = [member for member in VARIANTS if member.label == "lora_null v2"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("member", FORMS + THROUGH_BASE, ids=str)
def test_an_offloaded_base_is_as_good_as_one_at_hand(place: str, member: Member, tiny: str, tmp_path: Path) -> None:
    config = member.config(r=2, target_modules=["q_proj", "up_proj"])
    model, other = get_peft_model(PLACES[place](tiny, tmp_path), config), get_peft_model(load(tiny), config)
    assert steps(model) == steps(other)
    trained = logits(other)
    assert torch.equal(logits(model), trained)
    model.save_pretrained(str(tmp_path / "saved"))
    assert torch.equal(logits(PeftModel.from_pretrained(load(tiny), str(tmp_path / "saved"))), trained)
    again = get_peft_model(PLACES[place](tiny, tmp_path), replace(PeftConfig.from_pretrained(str(tmp_path / "saved"))))
    set_peft_model_state_dict(again, load_peft_weights(str(tmp_path / "saved")))
    assert torch.equal(logits(again), trained)
    again.add_adapter("second", KaSAConfig(r=2, target_modules=["v_proj"]))
    again.set_adapter("second")
    assert torch.isfinite(logits(again)).all()
    model.merge_adapter()
    assert close(logits(model), trained)
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    model.merge_adapter()
    with model.disable_adapter():  # which unmerges, in the middle of a forward pass
        assert torch.equal(logits(model), logits(load(tiny)))
    assert torch.equal(logits(model), trained)
    assert close(logits(model.merge_and_unload()), trained)


def test_a_merge_of_one_layer_reaches_what_is_on_disk(tiny: str, tmp_path: Path) -> None:
    model = get_peft_model(offloaded(tiny, tmp_path), PiSSAConfig(r=2, target_modules=["q_proj"]))
    move(model)
    trained, layer = logits(model), model.base_model.model.model.layers[1].self_attn.q_proj
    layer.merge()
    assert close(layer.base.matrix() - layer.original(), layer.get_delta_weight("default"))
    assert close(logits(model), trained)
    layer.unmerge()
    assert torch.equal(logits(model), trained)


def test_loaders_that_would_offload_an_adapter_are_refused(tiny: str, tmp_path: Path) -> None:
    get_peft_model(load(tiny), PiSSAConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"hf_device_map has \['cpu', 'disk'\].*set_peft_model_state_dict"):
        PeftModel.from_pretrained(offloaded(tiny, tmp_path), str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: the base is offloaded"):
        offloaded(tiny, tmp_path).load_adapter(str(tmp_path / "saved"))
