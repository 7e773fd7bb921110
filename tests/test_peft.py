"""The ways in which PEFT's and transformers' users make, read and switch adapters."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path

import peft
import pytest
import torch
from bases import learning, load, logits, move, stack, steps
from members import MEMBERS, Member
from peft import (
    PeftModel,
    PeftType,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_kasa
from peft_kasa import PiSSAConfig, SpectralConfig, SpectralLinear, SpectralModel
from peft_kasa.methods.arguments import Checked

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)


def test_the_type_is_a_real_member() -> None:
    member = PeftType.PEFT_KASA
    assert PeftType("PEFT_KASA") is PeftType["PEFT_KASA"] is member
    assert member in list(PeftType)
    assert member.value == member.name == "PEFT_KASA"
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    assert isinstance(member, PeftType)
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is SpectralModel


def test_importing_again_changes_nothing() -> None:
    import importlib

    from torch.optim.optimizer import _global_optimizer_pre_hooks
    from transformers.trainer import DEFAULT_CALLBACKS

    before = (len(list(PeftType)), len(_global_optimizer_pre_hooks), list(DEFAULT_CALLBACKS))
    importlib.reload(peft_kasa)
    assert (len(list(PeftType)), len(_global_optimizer_pre_hooks), list(DEFAULT_CALLBACKS)) == before
    assert issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PEFT_KASA], peft.PeftConfig)


def test_an_old_peft_is_refused_with_the_remedy() -> None:
    script = "import peft; peft.__version__ = '0.20.1'; import peft_kasa"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "peft_kasa needs peft >= 0.21.0" in done.stderr
    assert "pip install -U peft" in done.stderr


@each_member
def test_inject_and_plain_state_dicts(member: Member, tiny: str) -> None:
    model = inject_adapter_in_model(member.config(), load(tiny))
    move(model)
    state = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(member.config(), load(tiny))
    set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other), logits(model))


@each_member
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_transformers_own_add_and_load(member: Member, kind: str, tiny: str, tmp_path: Path) -> None:
    model = load(tiny, kind)
    model.add_adapter(member.config(r=4), adapter_name="mine")
    model.set_adapter("mine")
    move(model)
    trained = logits(model)
    model.save_pretrained(str(tmp_path))
    again = load(tiny, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        again.load_adapter(str(tmp_path), adapter_name="theirs")
        assert torch.equal(logits(again), trained)
    again.disable_adapters()
    assert torch.equal(logits(again), logits(load(tiny, kind)))


def test_transformers_adds_an_adapter_after_one_that_was_refused(tiny: str) -> None:
    model = load(tiny)
    with pytest.raises(ValueError, match="r has to be at most"):
        model.add_adapter(MEMBERS[0].config(r=33), adapter_name="mine")
    model.add_adapter(MEMBERS[0].config(), adapter_name="mine")
    assert model.active_adapters() == ["mine"]


@each_member
def test_transformers_loads_what_peft_saved(member: Member, tiny: str, tmp_path: Path) -> None:
    model = get_peft_model(load(tiny), member.config())
    move(model)
    model.save_pretrained(str(tmp_path))
    again = load(tiny)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again), logits(model))


@each_member
def test_transformers_loading_onto_another_base_is_refused_at_first_use(
    member: Member, tiny: str, tmp_path: Path
) -> None:
    model = get_peft_model(load(tiny), member.config())
    model.save_pretrained(str(tmp_path))
    other = load(tiny)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.normal_(0, 0.2)
    other.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: the adapter was trained on another weight"):
        logits(other)


def test_without_the_plugin_the_error_names_it(tiny: str, tmp_path: Path) -> None:
    get_peft_model(load(tiny), PiSSAConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    script = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("KeyError: 'PEFT_KASA'")


@each_member
def test_targets_patterns_and_layers(member: Member, tiny: str) -> None:
    config = member.config(
        r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[1], rank_pattern={"up_proj": 6}, alpha=8
    )
    model = get_peft_model(load(tiny), config)
    layers = {m.name: m.adapters["default"] for m in model.modules() if isinstance(m, SpectralLinear)}
    ranks = {name: (known.rank, known.scale) for name, known in layers.items()}
    assert ranks == {"model.layers.1.self_attn.q_proj": (4, 2.0), "model.layers.1.mlp.up_proj": (6, 8 / 6)}
    regex = get_peft_model(load(tiny), member.config(target_modules=r".*\.1\..*(q|k)_proj", use_rslora=True, alpha=8))
    scales = {m.name: m.adapters["default"].scale for m in regex.modules() if isinstance(m, SpectralLinear)}
    assert scales == {"model.layers.1.self_attn.q_proj": 4.0, "model.layers.1.self_attn.k_proj": 4.0}


@each_member
def test_default_targets_and_modules_to_save(member: Member, tiny: str, tmp_path: Path) -> None:
    config = member.config(target_modules=None, modules_to_save=["lm_head"])
    model = get_peft_model(load(tiny), config)
    names = {m.name.split(".")[-1] for m in model.modules() if isinstance(m, SpectralLinear)}
    assert names == {"q_proj", "v_proj"}
    move(model)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(load(tiny), str(tmp_path))
    assert torch.equal(logits(again), logits(model))


@each_member
def test_conv1d_keeps_its_transposed_weight(member: Member) -> None:
    linear, conv = stack()[0], Conv1D(12, 24)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    x = torch.randn(3, 24)
    one, two = (get_peft_model(nn.Sequential(layer), member.config(target_modules=["0"])) for layer in (linear, conv))
    for model in (one, two):
        move(model)
    assert torch.allclose(one(x), two(x), atol=1e-5)
    delta = two.base_model.model[0].get_delta_weight("default")
    assert torch.allclose(one.base_model.model[0].get_delta_weight("default").T, delta, atol=1e-6)
    expected = two(x)
    two.merge_adapter()
    assert torch.allclose(two(x), expected, atol=1e-5)


@each_member
def test_peft_converts_it_to_lora(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config(target_modules=["q_proj"]))
    move(model)
    lora, state = convert_to_lora(model, rank=4 * member.export_rank)
    again = get_peft_model(load(tiny), lora)
    set_peft_model_state_dict(again, state)
    assert (logits(again) - logits(model)).norm() < 1e-5 * logits(model).norm()


@each_member
def test_gradient_checkpointing_and_autocast(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config())
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.isfinite(torch.tensor(steps(model))))


@each_member
def test_status_and_repr_say_what_is_there(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config())
    status = model.get_model_status()
    assert (status.peft_types, status.enabled, status.active_adapters) == ({"default": "PEFT_KASA"}, True, ["default"])
    assert (status.requires_grad, status.trainable_params) == (
        {"default": True},
        sum(p.numel() for p in learning(model)),
    )
    assert f"SpectralLinear(default: {member.name} r=4 s=" in repr(model)
    assert repr(member.config(r=3)).startswith(f"{member.config_class.__name__}(r=3, target_modules=")


@each_member
def test_status_follows_what_is_switched_merged_and_deleted(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config(target_modules=["q_proj"]))
    model.add_adapter("second", PiSSAConfig(r=2, target_modules=["q_proj", "up_proj"]))
    first = model.get_layer_status()[0]
    assert (first.available_adapters, first.requires_grad) == (
        ["default", "second"],
        {"default": True, "second": False},
    )
    model.base_model.set_adapter(["default", "second"])
    status = model.get_model_status()
    assert (status.active_adapters, status.num_adapter_layers) == (["default", "second"], 4)
    assert status.requires_grad == {"default": True, "second": True}
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    model.delete_adapter("default")
    status = model.get_model_status()
    assert (status.available_adapters, status.active_adapters) == (["second"], ["second"])
    assert status.requires_grad == {"second": True}


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_a_name_that_is_no_adapters_is_not_merged(verb: str, tiny: str) -> None:
    model = get_peft_model(load(tiny), PiSSAConfig(r=2, target_modules=["q_proj"]))
    move(model)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"adapter_names have to be of \['default'\]. Found \['typo'\]"):
        getattr(model, verb)(adapter_names=["default", "typo"])
    assert not model.get_model_status().merged_adapters
    assert torch.equal(logits(model), expected)


@each_member
def test_deleting_the_active_adapter_activates_one_that_is_left(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), PiSSAConfig(r=2, target_modules=["q_proj"]))
    move(model)
    expected = logits(model)
    model.add_adapter("second", member.config())
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="second was active which is now deleted"):
        model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)
    assert not any(".second." in name for name in model.state_dict())


BAD = [
    ({"r": 0}, "r has to be a whole number of at least 1. Found 0"),
    ({"r": 2.5}, "r has to be a whole number of at least 1. Found 2.5"),
    ({"rank_pattern": {"q": -1}}, "Found -1"),
    ({"dropout": 1.0}, "dropout has to be 0 <= dropout < 1. Found 1.0"),
    ({"alpha": 0}, "alpha has to be a finite number above 0. Found 0"),
    ({"alpha": "16"}, "alpha has to be a finite number above 0. Found '16'"),
    ({"use_rslora": True}, "use_rslora needs alpha"),
    ({"r": True}, "Found True"),
    ({"reduction": "max"}, "reduction has to be 'mean' or 'sum'. Found 'max'"),
    ({"method": "other"}, "leave it out"),
    ({"target_modules": "("}, "target_modules has to be a regular expression. Found '(' (missing "),
    ({"rank_pattern": {"[a": 2}}, "rank_pattern has to be a regular expression. Found"),
    ({"target_modules": "x", "layers_to_transform": [0]}, "layers_to_transform needs target_modules as a list"),
]


@each_member
@pytest.mark.parametrize(("given", "said"), BAD, ids=lambda value: str(value)[:30])
def test_bad_arguments_are_refused(member: Member, given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        member.config_class(**given)


UNKNOWN = {
    "lora_alpha": "It is of LoraConfig: the name here is alpha.",
    "lora_dropout": "It is of LoraConfig: the name here is dropout.",
    "init_lora_weights": "the start is the choice of the config's class, and init_weights=False",
    "eva_config": "hand the fields of it to EVAConfig",
    "target_module": "Did you mean 'target_modules'?",
    "zzz": "",
}


@each_member
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_arguments_are_refused_with_the_name_here(member: Member, name: str) -> None:
    said = re.escape(f"{member.config_class.__name__} has no argument {name!r}.") + ".*" + re.escape(UNKNOWN[name])
    with pytest.raises(TypeError, match=said):
        member.config_class(**{name: 16})
    with pytest.raises(TypeError, match="has no argument"):
        replace(member.config_class(r=2), **{name: 16})


@each_member
def test_the_check_of_arguments_keeps_signatures_and_copies(member: Member) -> None:
    config = member.config_class(r=3, alpha=6.0)
    assert list(inspect.signature(member.config_class).parameters) == [field.name for field in fields(config)]
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == replace(config) == config


def test_a_users_own_config_may_take_any_arguments() -> None:
    class Own(Checked):
        def __init__(self, rank: int, **given: float) -> None:
            self.given = given

    assert Own(3, lora_alpha=2.0).given == {"lora_alpha": 2.0}


def test_the_base_of_the_family_is_not_a_method() -> None:
    with pytest.raises(TypeError, match="Use a method's config"):
        SpectralConfig()


@each_member
def test_trained_tokens_are_saved_and_loaded(member: Member, tiny: str, tmp_path: Path) -> None:
    """TRL trains added tokens this way."""
    model = get_peft_model(load(tiny), member.config(trainable_token_indices={"embed_tokens": [1, 2]}))
    move(model)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(load(tiny), str(tmp_path))), logits(model))


def test_modules_with_adapters_of_another_kind_are_left_alone(tiny: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        model = load(tiny)
        model.model.norm.adapters = {"default": "somebody else's"}
        return model

    model = get_peft_model(base(), PiSSAConfig(r=2, target_modules=["q_proj"]))
    move(model)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(base(), str(tmp_path))), logits(model))
