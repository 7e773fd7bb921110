"""Statistics of data: what is collected of inputs, on which targets, and what the model keeps."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bases import load, logits, move, tokens
from calibrating import ALL, LAYER, LENGTHS, ROWS, close, equal, hooks, seen_by
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from peft_kasa import CorDAConfig, EVAConfig, LoRAOneConfig, LoRASBConfig, PiSSAConfig, calibrate
from peft_kasa.adapter.base.base_weight import BaseWeight
from peft_kasa.adapter.files.statistics import Statistics
from peft_kasa.calibration.targets import targets

# Inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [EVAConfig, CorDAConfig])
@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", 1e-6), ("bf16", 1e-6), ("nf4", 1e-6), ("int8", 1e-3)])
def test_moments_are_those_of_the_inputs(config_class: Any, kind: str, tolerance: float, tiny: str) -> None:
    model = load(tiny, kind)
    config = config_class(**ALL)
    found = calibrate(model, ROWS, config)
    assert config.statistics is found
    assert len(found.names) == 14
    for name, inputs in seen_by(model.train(kind == "nf4"), ROWS).items():  # in evaluation, 4-bit layers round more
        if name == "lm_head":
            continue
        if config_class is CorDAConfig:
            inputs = [x / x.max().abs() for x in inputs]
        stacked = torch.cat(inputs)
        close(found.evidence(name).matrix(), stacked.T @ stacked, tolerance)
        assert found.evidence(name).count == sum(LENGTHS)


@pytest.mark.parametrize("config_class", [EVAConfig, CorDAConfig])
def test_the_batch_size_does_not_matter(config_class: Any, tiny: str) -> None:
    model = load(tiny)
    one, *others = (calibrate(model, ROWS, config_class(**ALL), batch_size=size) for size in (1, 2, 4, 6))
    for other in others:
        for name in one.names:
            close(other.evidence(name).matrix(), one.evidence(name).matrix(), 1e-5)
            assert other.evidence(name).count == one.evidence(name).count


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("config_class", [EVAConfig, CorDAConfig])
def test_modules_with_the_same_inputs_share_one_object(config_class: Any, size: int, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    found = calibrate(load(tiny), ROWS, config_class(**ALL), batch_size=size)
    found.save(path)
    for statistics in (found, Statistics.load(path)):
        held = {name: statistics.evidence(f"{LAYER}self_attn.{name}_proj") for name in "qkvo"}
        assert held["q"] is held["k"] is held["v"] is not held["o"]
        gate, up = (statistics.evidence(f"{LAYER}mlp.{name}_proj") for name in ("gate", "up"))
        assert gate is up
    assert "14 modules in 8 groups" in repr(found)


def test_padding_and_other_tokens_do_not_count(tiny: str) -> None:
    """Whatever stands in the padding, on whichever side."""
    model = load(tiny)
    name = f"{LAYER}mlp.down_proj"
    expected = calibrate(model, ROWS[:2], EVAConfig(**ALL)).evidence(name).matrix()
    ids = torch.tensor([ROWS[0]["input_ids"], ROWS[1]["input_ids"] + [63, 1, 2]])
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    found = calibrate(model, [{"input_ids": ids, "attention_mask": mask}], EVAConfig(**ALL))
    close(found.evidence(name).matrix(), expected, 1e-6)


def test_labels_only_counts_the_tokens_to_learn(tiny: str) -> None:
    model = load(tiny)
    rows = [row | {"labels": [-100] * 2 + row["input_ids"][2:]} for row in ROWS]
    found = calibrate(model, rows, EVAConfig(**ALL), labels_only=True, batch_size=3)
    stacked = torch.cat([x[2:] for x in seen_by(model, rows)[f"{LAYER}mlp.up_proj"]])
    close(found.evidence(f"{LAYER}mlp.up_proj").matrix(), stacked.T @ stacked, 1e-6)
    with pytest.raises(ValueError, match="labels_only needs `labels`"):
        calibrate(model, ROWS, EVAConfig(**ALL), labels_only=True)


def test_inputs_that_are_not_finite_are_refused_by_name(tiny: str) -> None:
    model = load(tiny)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: Inputs have to be finite"):
        calibrate(model, ROWS, CorDAConfig(**ALL))
    assert hooks(model) == 0


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.used(self.first(x).reshape(-1, 4)[::2])
        return {"loss": y.square().mean(), "y": y}


@pytest.mark.parametrize("config_class", [EVAConfig, LoRASBConfig])
def test_a_module_that_is_never_called_is_named(config_class: Any) -> None:
    data = [{"x": torch.randn(1, 6, 4)}]
    with pytest.raises(ValueError, match=r"idle: it was never called by the 1 sequences.*exclude_modules"):
        calibrate(Experts(), data, config_class(r=1, target_modules=["first", "used", "idle"]))
    found = calibrate(Experts(), data, config_class(r=1, target_modules=["first", "used"]))
    assert found.names == ("first", "used")


def test_inputs_that_cannot_be_told_apart_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"used: Inputs have to be of shape .*batch_size=1"):
        calibrate(Experts(), [{"x": torch.randn(2, 6, 4)}], CorDAConfig(r=1, target_modules=["used"]))
    assert calibrate(Experts(), [{"x": torch.randn(1, 6, 4)}], CorDAConfig(r=1, target_modules=["used"])).seen == 1


# The model is left as it was ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [CorDAConfig, LoRASBConfig])
@pytest.mark.parametrize("kind", ["fp32", "nf4", "int8"])
def test_the_model_is_left_as_it_was(config_class: Any, kind: str, tiny: str) -> None:
    model = load(tiny, kind)
    model.train()
    model.model.layers[0].eval()
    names = targets(model, PiSSAConfig(**ALL))
    before = {name: BaseWeight(module).matrix() for name, module in names.items()}
    flags = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    calibrate(model, ROWS, config_class(**ALL))
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks(model) == 0
    assert all(torch.equal(BaseWeight(names[name]).matrix(), before[name]) for name in names)


def test_other_adapters_are_off_and_stay_active(tiny: str) -> None:
    model = get_peft_model(load(tiny), PiSSAConfig(r=2, target_modules=["q_proj", "down_proj"]))
    move(model, 0.5)
    before = logits(model)
    model.add_adapter("data", EVAConfig(**ALL))
    found = calibrate(model, ROWS, "data")
    expected = calibrate(load(tiny), ROWS, EVAConfig(**ALL))
    assert equal(found, expected)
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), before)


def test_a_merged_base_is_refused(tiny: str) -> None:
    model = get_peft_model(load(tiny), PiSSAConfig(**ALL))
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="unmerge"):
        calibrate(model, ROWS, EVAConfig(**ALL))


# Names and configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["v_proj", "down_proj"]},
        {"target_modules": r".*\.(q|o)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": None},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
)
def test_targets_are_those_that_peft_wraps(given: dict[str, Any], tiny: str) -> None:
    model = load(tiny)
    config = PiSSAConfig(r=2, **given)
    before = copy.deepcopy(config)
    found = list(targets(model, config))
    assert config == before
    wrapped = get_peft_model(model, config)
    assert found == [layer.name for layer in wrapped.modules() if hasattr(layer, "peft_kasa_learnt")]
    assert list(targets(wrapped, before)) == found


def test_a_config_calibrated_first_starts_as_an_adapter_calibrated_later(tiny: str) -> None:
    config, model = CorDAConfig(**ALL), load(tiny)
    calibrate(model, ROWS, config)
    first = get_peft_model(model, config)
    later = get_peft_model(load(tiny), CorDAConfig(**ALL))
    with pytest.raises(ValueError, match="calibrate"):
        logits(later)
    calibrate(later, ROWS)
    states = [dict(m.named_parameters()) for m in (first, later)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_head_may_be_a_target(tiny: str) -> None:
    model = load(tiny)
    found = calibrate(model, ROWS, EVAConfig(r=2, target_modules=["lm_head"]))
    stacked = torch.cat(seen_by(model, ROWS)["lm_head"])
    close(found.evidence("lm_head").matrix(), stacked.T @ stacked, 1e-6)


def test_what_cannot_be_calibrated_says_why(tiny: str) -> None:
    model = get_peft_model(load(tiny), PiSSAConfig(**ALL))
    with pytest.raises(ValueError, match="pissa starts from the weights alone"):
        calibrate(model, ROWS)
    with pytest.raises(ValueError, match=r"no adapter 'other'.*Found \['default'\]"):
        calibrate(model, ROWS, "other")
    with pytest.raises(ValueError, match="The model has no adapter of peft_kasa: wrap it with get_peft_model first"):
        calibrate(load(tiny), ROWS)
    with pytest.raises(TypeError, match="a name or a config"):
        calibrate(model, ROWS, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Found none for"):
        calibrate(load(tiny), ROWS, EVAConfig(r=1, target_modules=["absent"]))
    with pytest.raises(TypeError, match=r"embed_tokens: .*not a linear layer"):
        calibrate(load(tiny), ROWS, EVAConfig(r=1, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="`samples`"):
        calibrate(load(tiny), ROWS, EVAConfig(**ALL), samples=0)


def test_a_trained_adapter_is_not_started_afresh(tiny: str, tmp_path: Path) -> None:
    model = get_peft_model(load(tiny), CorDAConfig(**ALL))
    calibrate(model, ROWS)
    calibrate(model, ROWS[:3])
    fresh = copy.deepcopy(model)
    move(model)
    model.save_pretrained(str(tmp_path))
    reloaded = PeftModel.from_pretrained(load(tiny), str(tmp_path))
    for trained in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), reloaded):
        expected = logits(trained)
        with pytest.raises(ValueError, match="has been trained, or came from a file"):
            calibrate(trained, ROWS)
        assert torch.equal(logits(trained), expected)
    calibrate(fresh, ROWS)


def test_ranks_are_chosen_anew_unless_modules_were_left_out(tiny: str) -> None:
    few = get_peft_model(load(tiny), EVAConfig(**ALL))
    calibrate(few, ROWS)
    with pytest.raises(ValueError, match=r"were chosen before, and \d+ modules left out"):
        calibrate(few, ROWS[:3])
    again = get_peft_model(load(tiny), EVAConfig(**ALL, rank_budget=0.9))  # leaves none out
    calibrate(again, ROWS[:3])
    calibrate(again, ROWS)
    once = get_peft_model(load(tiny), EVAConfig(**ALL, rank_budget=0.9))
    calibrate(once, ROWS)
    assert again.peft_config["default"].rank_pattern == once.peft_config["default"].rank_pattern
    assert torch.equal(logits(again), logits(once))


def test_an_input_that_is_written_to_later_is_noticed() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, input: Tensor) -> SimpleNamespace:
            h = self.a(input)
            h += self.b(h)
            return SimpleNamespace(loss=h.square().mean())

    with pytest.raises(ValueError, match="b: its input is written to after it is used"):
        calibrate(Residual(), [{"input": torch.randn(1, 3, 4)}], LoRAOneConfig(r=2, target_modules=["a", "b"]))


def test_a_decoder_reads_what_its_labels_say() -> None:
    """As in training: the batches of a collator for sequences to sequences have no other input for it."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    labels = tokens(2, 6, seed=1)
    batch = {"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    found = calibrate(model, [batch | {"labels": labels}], CorDAConfig(target_modules=["q"]))
    given = batch | {"decoder_input_ids": model._shift_right(labels)}
    expected = calibrate(model, [given], CorDAConfig(target_modules=["q"]))
    assert len(found.names) == 3
    for name in found.names:
        assert torch.equal(found.evidence(name).matrix(), expected.evidence(name).matrix())
    labels[0, -1] = -100
    with pytest.raises(ValueError, match="need a batch without padding"):
        calibrate(model, [batch | {"labels": labels}], CorDAConfig(target_modules=["q"]))
