"""Saving and loading: exact, without a decomposition, and refused by name where it cannot be right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bases import BASES, load, logits, move, steps
from members import IDENTICAL, MEMBERS, Member
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_kasa import SpectralLinear

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)
PISSA = next(member for member in MEMBERS if member.name == "pissa")

FRESH = """
import sys, torch
import bases, peft_kasa
from peft import PeftModel
def refuse(*args, **kwargs): raise AssertionError("a decomposition ran")
torch.linalg.svd = torch.linalg.eigh = torch.linalg.qr = refuse
out, tiny, kind, *folders = sys.argv[1:]
found = [
    bases.logits(PeftModel.from_pretrained(bases.load(tiny, kind), folder, low_cpu_mem_usage=low))
    for folder in folders
    for low in (False, True)
]
torch.save(found, out)
"""


def saved(member: Member, tiny: str, folder: Path, kind: str = "fp32", **given: object) -> tuple[PeftModel, str]:
    """A trained adapter and where it was saved."""
    model = get_peft_model(load(tiny, kind), member.config(**given))
    move(model)
    model.save_pretrained(str(folder))
    return model, str(folder)


def change(folder: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrites an adapter's tensors."""
    path = os.path.join(folder, "adapter_model.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@each_member
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("low", [False, True])
def test_reload_is_exact(member: Member, kind: str, low: bool, tiny: str, tmp_path: Path) -> None:
    model, folder = saved(member, tiny, tmp_path, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        again = PeftModel.from_pretrained(load(tiny, kind), folder, low_cpu_mem_usage=low)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_a_fresh_process_decomposes_nothing(kind: str, tiny: str, tmp_path: Path) -> None:
    """Loading in both ways."""
    models, folders = zip(
        *(saved(member, tiny, tmp_path / member.name, kind) for member in (MEMBERS[0], MEMBERS[3])), strict=True
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", FRESH, str(tmp_path / "out.pt"), tiny, kind, *folders]
    subprocess.run(command, check=True, env=environment)
    plain_and_low = torch.load(tmp_path / "out.pt")
    assert len(plain_and_low) == 4
    for model, found in zip([model for model in models for _ in range(2)], plain_and_low, strict=True):
        assert torch.equal(found, logits(model))


@each_member
def test_auto_classes_and_configs_read_it(member: Member, tiny: str, tmp_path: Path) -> None:
    model, folder = saved(member, tiny, tmp_path, task_type="CAUSAL_LM", alpha=6.0, rank_pattern={"q_proj": 2})
    config = PeftConfig.from_pretrained(folder)
    assert type(config) is member.config_class
    assert (config.alpha, config.rank_pattern) == (6.0, {"q_proj": 2})
    again = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again), logits(model))


@each_member
def test_a_reloaded_adapter_trains_on(member: Member, tiny: str, tmp_path: Path) -> None:
    model, folder = saved(member, tiny, tmp_path)
    again = PeftModel.from_pretrained(load(tiny), folder, is_trainable=True)
    assert steps(again) == steps(model)
    assert torch.equal(logits(again), logits(model))


@each_member
def test_a_reloaded_config_lends_itself_to_a_second_adapter(member: Member, tiny: str, tmp_path: Path) -> None:
    _, folder = saved(member, tiny, tmp_path)
    model = PeftModel.from_pretrained(load(tiny), folder, is_trainable=True)
    trained = logits(model)
    model.peft_config["default"].statistics = member.config().statistics  # a file has none
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    fresh = get_peft_model(load(tiny), member.config())
    assert torch.equal(logits(model), logits(fresh))
    assert steps(model) == steps(fresh)
    model.set_adapter("default")
    assert torch.equal(logits(model), trained)


@each_member
def test_a_config_from_a_file_starts_a_new_adapter(member: Member, tiny: str, tmp_path: Path) -> None:
    _, folder = saved(member, tiny, tmp_path)
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode, config.statistics = False, member.config().statistics
    model, fresh = get_peft_model(load(tiny), config), get_peft_model(load(tiny), member.config())
    assert steps(model) == steps(fresh)


@each_member
def test_a_ref_copy_is_exact(member: Member, tiny: str, tmp_path: Path) -> None:
    """As TRL's DPO, GRPO and KTO make it: a second adapter with the first one's config, then a copy by name."""
    _, folder = saved(member, tiny, tmp_path)
    model = PeftModel.from_pretrained(load(tiny), folder, is_trainable=True)
    policy = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model), policy)
    model.set_adapter("default")
    steps(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), policy)


@pytest.mark.parametrize("low", [False, True])
def test_several_adapters_are_saved_and_loaded_by_name(low: bool, tiny: str, tmp_path: Path) -> None:
    model, folder = saved(PISSA, tiny, tmp_path)
    for member in MEMBERS:
        model.add_adapter(member.name, member.config())
        model.set_adapter(member.name)
        move(model)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(load(tiny), folder)
    for member in MEMBERS:
        again.load_adapter(os.path.join(folder, member.name), member.name, low_cpu_mem_usage=low)
        for each in (again, model):
            each.set_adapter(member.name)
        assert torch.equal(logits(again), logits(model))


# What is refused, or warned of ------------------------------------------------------------------------------------


def refused(tiny: str, folder: str, *said: str, base: LlamaForCausalLM | None = None) -> None:
    """Loading has to fail with all of these words, and to leave the base as it was."""
    base = base if base is not None else load(tiny)
    expected = logits(base)
    with pytest.raises(ValueError, match=".*".join(said)):
        PeftModel.from_pretrained(base, folder)
    assert not any(isinstance(module, SpectralLinear) for module in base.modules())
    assert torch.equal(logits(base), expected)


@each_member
def test_another_model_of_the_same_shape_is_refused(member: Member, tiny: str, tmp_path: Path) -> None:
    _, folder = saved(member, tiny, tmp_path)
    other = load(tiny)
    torch.manual_seed(9)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.normal_(0, 0.2)
    refused(tiny, folder, r"layers\.1\.mlp\.up_proj", "trained on another weight", "Load the base model", base=other)


@each_member
def test_another_shape_is_refused(member: Member, tiny: str, tmp_path: Path) -> None:
    _, folder = saved(member, tiny, tmp_path, save_frames=True)
    config = LlamaConfig.from_pretrained(tiny)
    config.intermediate_size = 192
    refused(tiny, folder, r"layers\.0\.mlp", "of shape", "Load the base", base=LlamaForCausalLM(config))


@each_member
def test_a_missing_tensor_is_refused(member: Member, tiny: str, tmp_path: Path) -> None:
    _, folder = saved(member, tiny, tmp_path)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(key for key in tensors if "layers.1.self_attn.q_proj." in key and ".core" in key)]

    change(folder, drop)
    refused(tiny, folder, r"layers\.1\.self_attn\.q_proj", "lacks core", "save it again")


@each_member
def test_an_extra_tensor_is_refused(member: Member, tiny: str, tmp_path: Path) -> None:
    _, folder = saved(member, tiny, tmp_path)
    key = "base_model.model.model.layers.7.self_attn.q_proj.peft_kasa_learnt.left"
    change(folder, lambda tensors: tensors.update({key: torch.zeros(2, 2)}))
    refused(tiny, folder, r"layers\.7\.self_attn\.q_proj", "has left", "Load it onto the base")


@each_member
def test_nan_in_the_file_is_refused(member: Member, tiny: str, tmp_path: Path) -> None:
    _, folder = saved(member, tiny, tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if "layers.0.mlp.down_proj." in key and ".core" in key)
        tensors[key].view(-1)[0] = torch.nan

    change(folder, spoil)
    refused(tiny, folder, r"layers\.0\.mlp\.down_proj", "core.* NaN", "Use another checkpoint")


def test_a_truncated_file_is_refused_before_the_model_is_touched(tiny: str, tmp_path: Path) -> None:
    _, folder = saved(PISSA, tiny, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(tiny, folder, r"adapter_model\.safetensors is damaged or was cut short", "Copy it again")


def test_another_r_in_the_config_is_refused(tiny: str, tmp_path: Path) -> None:
    _, folder = saved(PISSA, tiny, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 5}))
    refused(tiny, folder, r"q_proj", "of shape", "with another r", "or give the config r=4")


def test_another_method_than_the_files_is_named(tiny: str, tmp_path: Path) -> None:
    """As when a training goes on with another method: the config is not read again then."""
    saved(MEMBERS[0], tiny, tmp_path)
    model = get_peft_model(load(tiny), PISSA.config())
    expected = logits(model)
    with pytest.raises(ValueError, match=r"saved by another method.* cut_left, .*this adapter \(pissa\) takes"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(logits(model), expected)


def test_an_unknown_method_is_refused(tiny: str, tmp_path: Path) -> None:
    _, folder = saved(PISSA, tiny, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method": "none-such"}))
    refused(tiny, folder, f"one of {', '.join(sorted({member.name for member in MEMBERS}))}", "upgrade")


def test_a_field_of_a_later_version_is_ignored_with_a_warning(tiny: str, tmp_path: Path) -> None:
    model, folder = saved(PISSA, tiny, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new_field": 1}))
    with pytest.warns(UserWarning, match="new_field of PiSSAConfig"):
        again = PeftModel.from_pretrained(load(tiny), folder)
    assert torch.equal(logits(again), logits(model))


@each_member
def test_r_too_large_is_refused(member: Member, tiny: str) -> None:
    base = load(tiny)
    with pytest.raises(ValueError, match=r"self_attn\.k_proj: r has to be at most min\(out, in\).*Found 33"):
        get_peft_model(base, member.config(r=33))
    assert not any(isinstance(module, SpectralLinear) for module in base.modules())


@each_member
def test_nan_in_the_base_is_refused(member: Member, tiny: str) -> None:
    base = load(tiny)
    with torch.no_grad():
        base.model.layers[1].mlp.gate_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj: the base weight has 1 NaN.*Load an intact base"):
        get_peft_model(base, member.config())
    assert not any(isinstance(module, SpectralLinear) for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_failing_second_adapter_leaves_the_first(tiny: str) -> None:
    model = get_peft_model(load(tiny), PISSA.config())
    move(model)
    expected = logits(model)
    with pytest.raises(ValueError, match="r has to be at most"):
        model.add_adapter("second", PISSA.config(r=33))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    model.add_adapter("second", PISSA.config())


def test_no_cut_of_a_whole_weight(tiny: str) -> None:
    kasa = MEMBERS[0]
    with pytest.raises(ValueError, match=r"k_proj: truncation has to leave something of min\(m, n\) = 32.*Found 32"):
        get_peft_model(load(tiny), kasa.config(truncation=32))


def test_a_layer_that_is_not_linear_is_refused_by_name(tiny: str) -> None:
    with pytest.raises(TypeError, match=r"model\.embed_tokens: Embedding is not a linear layer.*leave it out"):
        get_peft_model(load(tiny), PISSA.config(target_modules=["embed_tokens"]))


@each_member
@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
def test_another_storage_of_the_base_warns_with_the_distance(
    member: Member, kind: str, tiny: str, tmp_path: Path
) -> None:
    model, folder = saved(member, tiny, tmp_path, save_frames=True)
    with pytest.warns(
        UserWarning, match=r"14 of 14 weights differ, by \d\.\de-0\d of their norm at most \(model\.layers"
    ):
        again = PeftModel.from_pretrained(load(tiny, kind), folder)
    expected = logits(model)
    assert (logits(again).float() - expected).norm() < 0.6 * expected.norm()


def test_an_adapter_made_after_an_evaluation_loads_without_a_warning(tiny: str, tmp_path: Path) -> None:
    base = load(tiny, "nf4")
    logits(base)  # repacks on some CPUs, which rounds the scales
    model = get_peft_model(base, PISSA.config())
    move(model)
    model.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        again = PeftModel.from_pretrained(load(tiny, "nf4"), str(tmp_path))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("moment", ["while writing", "before renaming"])
def test_an_interrupted_save_leaves_the_previous_adapter(
    moment: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved(PISSA, tiny, tmp_path)
    expected = logits(model)
    move(model, seed=5)

    def cut_short(tensors: object, filename: str, **_: object) -> None:
        Path(filename).write_bytes(b"half of a fi")
        raise KeyboardInterrupt

    if moment == "while writing":
        monkeypatch.setattr("safetensors.torch.save_file", cut_short)
    else:
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert torch.equal(logits(PeftModel.from_pretrained(load(tiny), folder)), expected)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_a_killed_save_leaves_the_previous_adapter(tiny: str, tmp_path: Path) -> None:
    """The process dies in the middle of the file, without any clean-up."""
    model, folder = saved(PISSA, tiny, tmp_path)
    script = """
import os, sys
import bases, peft_kasa, safetensors.torch
from peft import PeftModel
base, folder = sys.argv[1:]
model = PeftModel.from_pretrained(bases.load(base), folder, is_trainable=True)
bases.move(model, seed=5)
def half(tensors, filename, metadata=None):
    data = safetensors.torch.save(tensors, metadata)
    with open(filename, "wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        os._exit(9)
safetensors.torch.save_file = half
model.save_pretrained(folder)
"""
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(
        [sys.executable, "-c", script, tiny, folder], check=False, env=os.environ | {"PYTHONPATH": here}
    )
    assert done.returncode == 9
    assert torch.equal(logits(PeftModel.from_pretrained(load(tiny), folder)), logits(model))


def test_the_example_of_an_identity_start_needs_no_training_to_save(tiny: str, tmp_path: Path) -> None:
    model = get_peft_model(load(tiny), IDENTICAL[0].config())
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(load(tiny), str(tmp_path))), logits(load(tiny)))


def test_after_a_refused_load_the_right_file_loads_under_the_same_name(tiny: str, tmp_path: Path) -> None:
    model, good = saved(PISSA, tiny, tmp_path / "good")
    other = load(tiny)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.normal_(0, 0.2)
    get_peft_model(other, PISSA.config()).save_pretrained(str(tmp_path / "bad"))
    again = PeftModel.from_pretrained(load(tiny), good)
    with pytest.raises(ValueError, match="trained on another weight"):
        again.load_adapter(str(tmp_path / "bad"), "x")
    assert list(again.peft_config) == ["default"]
    again.load_adapter(good, "x")
    again.set_adapter("x")
    assert torch.equal(logits(again), logits(model))


def test_a_refused_load_leaves_no_trace_on_the_base(tiny: str, tmp_path: Path) -> None:
    _, folder = saved(PISSA, tiny, tmp_path)
    change(folder, lambda tensors: tensors.__delitem__(next(iter(tensors))))
    base = load(tiny)
    with pytest.raises(ValueError, match="lacks"):
        PeftModel.from_pretrained(base, folder)
    assert "peft_config" not in vars(base)


def test_a_missing_weights_file_is_refused_before_the_model_is_touched(tiny: str, tmp_path: Path) -> None:
    _, folder = saved(PISSA, tiny, tmp_path)
    os.remove(tmp_path / "adapter_model.safetensors")
    refused(tiny, folder, r"has no adapter_model\.safetensors", "Save the adapter again")


@pytest.mark.parametrize("key", ["base_model.model.model.norm.weight", "base_model.model.lm_head.lora_A.weight"])
def test_a_tensor_that_is_not_the_adapters_is_refused(key: str, tiny: str, tmp_path: Path) -> None:
    _, folder = saved(PISSA, tiny, tmp_path)
    change(folder, lambda tensors: tensors.update({key: torch.zeros(64)}))
    refused(tiny, folder, "which is none of the adapter's", "Save the adapter again")


def test_a_base_that_is_40_percent_off_is_refused(tiny: str, tmp_path: Path) -> None:
    _, folder = saved(PISSA, tiny, tmp_path)
    base = load(tiny)
    with torch.no_grad():
        for layer in base.model.layers:
            weight = layer.mlp.up_proj.weight
            weight.add_(torch.empty_like(weight).normal_(0, 0.4 * weight.std().item()))
    refused(tiny, folder, "trained on another weight", base=base)
