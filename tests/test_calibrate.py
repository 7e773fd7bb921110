"""Statistics of data: what is collected, from which data, on which bases, and what survives an interruption."""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bases import load, logits, move, stack
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from peft_kasa import CorDAConfig, EVAConfig, LoRAOneConfig, LoRASBConfig, PiSSAConfig, calibrate
from peft_kasa.adapter.base.base_weight import BaseWeight
from peft_kasa.adapter.files.statistics import Statistics
from peft_kasa.calibration import passes
from peft_kasa.calibration.batches import batches
from peft_kasa.calibration.targets import targets

LENGTHS = (8, 5, 12, 7, 3, 9)
LAYER = "model.layers.0."
ALL = {"r": 2, "target_modules": "all-linear"}


def sequences(seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 64, (n,), generator=generator).tolist()} for n in LENGTHS]


ROWS = sequences()


def seen_by(model: nn.Module, rows: list[dict[str, Any]]) -> dict[str, list[Tensor]]:
    """The inputs of every linear layer, sequence after sequence, in float64."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: found.setdefault(name, []).append(args[0][0].double())
        )
        for name, module in model.named_modules()
        if hasattr(module, "in_features")
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    return found


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert ((found - expected).norm() / expected.norm()).item() <= tolerance


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def equal(a: Statistics, b: Statistics) -> bool:
    """Bit for bit."""
    if a.names != b.names or a.seen != b.seen:
        return False
    for name in a.names:
        one, two = a.evidence(name), b.evidence(name)
        same = (
            torch.equal(one, two)
            if isinstance(one, Tensor)
            else torch.equal(one.triangle.packed(), two.triangle.packed())
            and torch.equal(one.mean, two.mean)
            and one.count == two.count
        )
        if not same:
            return False
    return True


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("the model was run")


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


# Gradients ------------------------------------------------------------------------------------------------------


def autograd(model: Any, size: int = 1, rows: list[dict[str, Any]] = ROWS) -> dict[str, Tensor]:
    """What autograd itself finds: the mean over the batches' losses, each counted by its sequences."""
    model.requires_grad_(True)
    for batch in batches(rows, batch_size=size):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        (model(**batch, labels=labels).loss * len(labels) / len(rows)).backward()
    return {name: m.weight.grad for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("size", [1, 4])
def test_gradients_are_autograds_own(size: int, tiny: str) -> None:
    found = calibrate(load(tiny), ROWS, LoRASBConfig(**ALL), batch_size=size)
    expected = autograd(load(tiny), size)
    assert len(found.names) == 14
    for name in found.names:
        close(found.evidence(name), expected[name], 1e-5)
        assert found.evidence(name).dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("nf4", 1e-5), ("nf4 single", 1e-5), ("bf16", 5e-2), ("fp16", 1e-2), ("int8", 0.2)]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_gradients_on_other_bases_are_those_of_the_floats_they_stand_for(
    kind: str, tolerance: float, wrapped: bool, tiny: str, tmp_path: Path
) -> None:
    """Also after an evaluation, which leaves 4-bit layers that let no gradient through on some CPUs."""
    model, floats = load(tiny, kind), load(tiny)
    logits(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "in_features"):
                floats.get_submodule(name).weight.copy_(BaseWeight(module).matrix())
    expected = autograd(floats)
    config: Any = LoRASBConfig(**ALL)
    if wrapped:
        model, config = get_peft_model(model, config), "default"
    found = calibrate(model, ROWS, config, path=tmp_path / "g.safetensors")
    for name in found.names:
        close(found.evidence(name), expected[name], tolerance)


def test_groups_give_what_one_pass_gives(tiny: str, tmp_path: Path) -> None:
    whole = calibrate(load(tiny), ROWS, LoRASBConfig(**ALL))
    paths = [tmp_path / name for name in ("few", "one")]
    few = calibrate(load(tiny), ROWS, LoRASBConfig(**ALL), path=paths[0], memory=40_000)
    one = calibrate(load(tiny), ROWS, LoRASBConfig(**ALL), path=paths[1], memory=1)
    for found in (few, one):
        assert set(found.names) == set(whole.names)
        for name in whole.names:
            close(found.evidence(name), whole.evidence(name), 1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "one"]


def test_moments_in_groups_are_the_same_bits(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    whole = calibrate(load(tiny), ROWS, EVAConfig(**ALL))
    found = calibrate(load(tiny), ROWS, EVAConfig(**ALL), path=path, memory=3 * 8 * 64**2)
    assert equal(found, whole)
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    q, v = (found.evidence(f"{LAYER}self_attn.{name}_proj") for name in "qv")
    assert q is v
    models = [get_peft_model(load(tiny), EVAConfig(**ALL)) for _ in range(2)]
    assert calibrate(models[0], ROWS, memory=1).is_freed
    calibrate(models[1], ROWS)
    states = [dict(model.named_parameters()) for model in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_an_adapter_starts_group_by_group(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from all gradients at once, and never with more than `memory` of them."""
    expected = get_peft_model(load(tiny), LoRAOneConfig(**ALL))
    calibrate(expected, ROWS)
    held: list[int] = []
    from peft_kasa.calibration import calibrate as module

    begin = module.begin

    def counting(layers: list[Any], adapter: str) -> None:
        held.append(sum(4 * layer.in_features * layer.out_features for layer in layers))
        begin(layers, adapter)

    monkeypatch.setattr(module, "begin", counting)
    model = get_peft_model(load(tiny), LoRAOneConfig(**ALL))
    found = calibrate(model, ROWS, memory=70_000)
    assert len(held) > 3
    assert max(held) <= 70_000
    assert model.peft_config["default"].statistics is None
    with pytest.raises(ValueError, match="freed"):
        found.evidence(found.names[0])
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-3)


def test_data_in_another_order_is_noticed_between_passes(tiny: str) -> None:
    data = DataLoader([{"input_ids": torch.tensor(row["input_ids"][:3])} for row in ROWS], batch_size=1, shuffle=True)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="turn shuffling off"):
        calibrate(get_peft_model(load(tiny), LoRASBConfig(**ALL)), data, memory=1)


def test_data_that_can_be_read_once_serves_all_passes(tiny: str) -> None:
    model = get_peft_model(load(tiny), LoRASBConfig(**ALL))
    assert calibrate(model, iter(ROWS), memory=70_000).seen == 6


class Aside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.aside = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.aside(x)
        return {"loss": self.used(x).mean()}


def test_a_module_without_a_gradient_is_named() -> None:
    data = [{"x": torch.randn(1, 6, 4)}]
    with pytest.raises(ValueError, match="aside: the loss gives it no gradient"):
        calibrate(Aside(), data, LoRASBConfig(r=1, target_modules=["used", "aside"]))
    with pytest.raises(ValueError, match="has to return a loss"):
        calibrate(nn.Sequential(nn.Linear(4, 4)), [{"input": torch.randn(1, 4)}], LoRASBConfig(r=1, target_modules="0"))


class Blocking(nn.Linear):
    """As a quantised layer whose kernel has no backward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


def test_a_layer_that_lets_no_gradient_through_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), Blocking(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.a(x)
            return {"loss": (y + self.b(y)).mean()}

    with pytest.raises(ValueError, match="b: no gradient passes through this layer"):
        calibrate(Model(), [{"x": torch.randn(1, 4)}], LoRASBConfig(r=1, target_modules=["a", "b"]))


def test_nothing_below_the_first_target_is_in_the_graph(tiny: str) -> None:
    model = load(tiny)
    model.enable_input_require_grads()
    graphs = []
    handle = model.model.layers[0].register_forward_hook(lambda _, __, out: graphs.append(out.requires_grad))
    calibrate(model, ROWS[:1], LoRASBConfig(r=2, target_modules=r".*layers\.1\..*_proj"))
    handle.remove()
    assert graphs == [False]


def test_a_loss_that_is_not_finite_is_refused(tiny: str) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="loss has to be finite"):
        calibrate(load(tiny), [{"input_ids": ids, "labels": torch.full_like(ids, -100)}], LoRASBConfig(**ALL))


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


# Interruptions and files ----------------------------------------------------------------------------------------


class CutError(Exception):
    pass


def cut(after: int, error: type[BaseException] = CutError) -> Iterator[dict[str, Any]]:
    yield from ROWS[:after]
    raise error


@pytest.mark.parametrize("config_class", [CorDAConfig, LoRASBConfig])
@pytest.mark.parametrize("size", [1, 2])
def test_a_calibration_goes_on_where_it_stopped_to_the_same_bits(
    config_class: Any, size: int, tiny: str, tmp_path: Path
) -> None:
    path, model = tmp_path / "s", load(tiny)

    class Failing:
        def __iter__(self) -> Iterator[Any]:
            return cut(4, KeyboardInterrupt)

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, Failing(), config_class(**ALL), path=path, batch_size=size)
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="interrupted after 4 sequences"):
        Statistics.load(path)
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    config = config_class(**ALL)
    found = calibrate(model, ROWS, config, path=path, batch_size=size)
    handle.remove()
    assert len(calls) == 2 // size
    assert config.statistics is found
    assert equal(found, calibrate(load(tiny), ROWS, config_class(**ALL), batch_size=size))
    assert equal(Statistics.load(path), found)


def test_ctrl_c_waits_for_the_end_of_the_batch(tiny: str, tmp_path: Path) -> None:
    path, model = tmp_path / "s", load(tiny)
    handler, calls = signal.getsignal(signal.SIGINT), []

    def interrupting(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    handle = model.model.layers[1].register_forward_pre_hook(interrupting)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, ROWS, CorDAConfig(**ALL), path=path)
    handle.remove()
    assert hooks(model) == 0
    assert signal.getsignal(signal.SIGINT) is handler
    assert Statistics.load(path, partial=True).seen == 3
    assert equal(calibrate(model, ROWS, CorDAConfig(**ALL), path=path), calibrate(model, ROWS, CorDAConfig(**ALL)))


def test_a_second_ctrl_c_does_not_wait(tiny: str, tmp_path: Path) -> None:
    model = load(tiny)

    def interrupting(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    handle = model.model.layers[1].register_forward_pre_hook(interrupting)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, ROWS, CorDAConfig(**ALL), path=tmp_path / "s")
    handle.remove()
    assert hooks(model) == 0
    assert not (tmp_path / "s").exists()


def test_half_a_batch_is_never_saved(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle of the model leaves the last whole state on disk."""
    monkeypatch.setattr(passes, "SAVE_EVERY", 0.0)
    path, model, calls = tmp_path / "s", load(tiny), []

    def failing(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise CutError

    handle = model.model.layers[1].register_forward_pre_hook(failing)
    with pytest.raises(CutError):
        calibrate(model, ROWS, EVAConfig(**ALL), path=path)
    handle.remove()
    assert hooks(model) == 0
    assert 1 <= Statistics.load(path, partial=True).seen <= 3
    assert equal(calibrate(model, ROWS, EVAConfig(**ALL), path=path), calibrate(model, ROWS, EVAConfig(**ALL)))


def test_an_error_before_the_first_module_leaves_what_was_taken_in(tiny: str, tmp_path: Path) -> None:
    path, model, calls = tmp_path / "s", load(tiny), []

    def failing(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise CutError

    handle = model.model.embed_tokens.register_forward_pre_hook(failing)
    with pytest.raises(CutError):
        calibrate(model, ROWS, EVAConfig(**ALL), path=path)
    handle.remove()
    assert Statistics.load(path, partial=True).seen == 3
    assert equal(calibrate(model, ROWS, EVAConfig(**ALL), path=path), calibrate(model, ROWS, EVAConfig(**ALL)))


def test_an_interrupted_adapter_still_asks_for_its_data(tiny: str) -> None:
    passed: list[int] = []

    class Data:
        def __iter__(self) -> Iterator[Any]:
            passed.append(1)
            return cut(3) if len(passed) == 3 else iter(ROWS)

    model = get_peft_model(load(tiny), LoRASBConfig(**ALL))
    with pytest.raises(CutError):
        calibrate(model, Data(), memory=70_000)
    with pytest.raises(ValueError, match=r"Call calibrate\(model, data"):
        logits(model)
    calibrate(model, ROWS, memory=70_000)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("config_class", [EVAConfig, LoRAOneConfig])
def test_ranks_are_chosen_over_all_modules(config_class: Any, tiny: str) -> None:
    model = get_peft_model(load(tiny), config_class(**ALL | {"rank_budget": 0.5}))
    calibrate(model, ROWS, memory=1)
    assert len(set(model.peft_config["default"].rank_pattern.values())) > 1
    assert logits(model).isfinite().all()


def test_groups_of_gradients_go_on_where_they_stopped(tiny: str, tmp_path: Path) -> None:
    path, passed = tmp_path / "g", []

    class Data:
        def __iter__(self) -> Iterator[Any]:
            passed.append(1)
            return cut(3) if len(passed) == 3 else iter(ROWS)

    model = get_peft_model(load(tiny), LoRASBConfig(**ALL))
    with pytest.raises(CutError):
        calibrate(model, Data(), path=path, memory=70_000)
    assert not path.exists()
    parts = sorted(tmp_path.iterdir())
    assert [Statistics.load(part, partial=True).seen for part in parts] == [6, 6, 3]
    calls: list[int] = []
    handle = model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))
    found = calibrate(model, ROWS, path=path, memory=70_000)
    handle.remove()
    groups = 1 + max(int(part.name.split("-of-")[1]) for part in parts) - 1
    assert len(calls) == 6 * (groups - 3) + 3
    assert [path.name for path in tmp_path.iterdir()] == ["g"]
    assert set(found.names) == set(calibrate(load(tiny), ROWS, LoRASBConfig(**ALL)).names)
    assert model.peft_config["default"].statistics is found


@pytest.mark.parametrize("config_class", [EVAConfig, LoRASBConfig])
@pytest.mark.parametrize("memory", [1, 2**30])
def test_a_complete_file_is_reused_without_the_model(config_class: Any, memory: int, tiny: str, tmp_path: Path) -> None:
    path, model = tmp_path / "s", load(tiny)
    found = calibrate(model, ROWS, config_class(**ALL), path=path, memory=memory)
    stamp = path.stat().st_mtime_ns
    model.register_forward_pre_hook(forbidden)
    again = calibrate(model, ROWS, config_class(**ALL), path=path, memory=memory)
    assert equal(again, found)
    fewer = calibrate(model, ROWS, config_class(r=2, target_modules=["q_proj"]), path=path)
    assert f"{LAYER}self_attn.q_proj" in fewer.names
    assert path.stat().st_mtime_ns == stamp


def test_a_file_grows_with_samples(tiny: str, tmp_path: Path) -> None:
    path, model = tmp_path / "s", load(tiny)
    assert calibrate(model, ROWS, EVAConfig(**ALL), path=path, samples=2).seen == 2
    found = calibrate(model, ROWS, EVAConfig(**ALL), path=path, samples=5)
    assert equal(found, calibrate(model, ROWS[:5], EVAConfig(**ALL)))
    with pytest.raises(ValueError, match=r"is of 5 sequences. Found samples=4"):
        calibrate(model, ROWS, EVAConfig(**ALL), path=path, samples=4)


def test_a_file_of_something_else_is_refused_by_name(tiny: str, tmp_path: Path) -> None:
    path, model = tmp_path / "s", load(tiny)
    few = {"r": 2, "target_modules": ["q_proj"]}
    calibrate(model, ROWS, EVAConfig(**few), path=path)
    with pytest.raises(ValueError, match="s is of inputs, and scaled inputs are needed"):
        calibrate(model, ROWS, CorDAConfig(**few), path=path)
    with pytest.raises(ValueError, match=r"s is not of model\.layers\.0\.self_attn\.k_proj"):
        calibrate(model, ROWS, EVAConfig(**ALL), path=path)
    with pytest.raises(ValueError, match="labels_only=False"):
        calibrate(model, ROWS, EVAConfig(**few), path=path, labels_only=True)
    for data in (sequences(1), list(reversed(ROWS)), ROWS[:3]):
        with pytest.raises(ValueError, match="s does not go with this call: it"):
            calibrate(model, data, EVAConfig(**few), path=path)
    torch.manual_seed(7)
    other = LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match=r"another base model: model\.layers\.0\.self_attn\.q_proj differs"):
        calibrate(other, ROWS, EVAConfig(**few), path=path)
    with pytest.raises(ValueError, match="another base model"):
        get_peft_model(other, EVAConfig(**few, statistics=str(path)))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 64])
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes], tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    found = calibrate(load(tiny), ROWS, EVAConfig(**ALL), path=path)
    path.write_bytes(damage(path.read_bytes()))
    for use in (lambda: Statistics.load(path), lambda: found.evidence(found.names[0])):
        with pytest.raises(ValueError, match=r"damaged or not a file of statistics.*another `path`"):
            use()
    with pytest.raises(FileNotFoundError, match="no statistics at"):
        Statistics.load(tmp_path / "absent")


def test_anothers_file_is_refused(tiny: str) -> None:
    with pytest.raises(ValueError, match="holds no statistics of this version"):
        Statistics.load(f"{tiny}/model.safetensors")


def test_copies_share_and_pickles_keep(tiny: str, tmp_path: Path) -> None:
    config = EVAConfig(**ALL)
    found = calibrate(load(tiny), ROWS, config)
    assert copy.deepcopy(config).statistics is found
    assert equal(pickle.loads(pickle.dumps(found)), found)
    found.save(tmp_path / "s")
    saved = Statistics.load(tmp_path / "s")
    assert equal(saved, found)
    assert equal(pickle.loads(pickle.dumps(saved)), found)
    assert (tmp_path / "s").stat().st_size < 0.6 * 8 * (6 * 64**2 + 2 * 128**2)
    with pytest.raises(ValueError, match=r"nowhere: there are no statistics.*14 other modules"):
        saved.evidence("nowhere")


# Data -----------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of letters, without a pad token, which chats."""

    eos_token, eos_token_id, pad_token_id = "$", 63, None
    chat_template: str | None = "yes"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [63 if c == "$" else ord(c) % 61 for c in text]}

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool, **_: Any) -> dict[str, list[int]]:
        text = "".join(f"{m['role'][0]}:{m['content']};" for m in messages) + "a:" * add_generation_prompt
        return self(text)


def of(data: Any, **given: Any) -> list[dict[str, list[Any]]]:
    return [{key: value.tolist() for key, value in batch.items()} for batch in batches(data, **given)]


def test_rows_of_every_kind_become_tokens() -> None:
    letters = Letters()
    ids = letters("ab")["input_ids"]
    assert of(["ab"], tokenizer=letters)[0]["input_ids"] == [ids]
    assert of([{"text": "ab"}], tokenizer=letters)[0]["input_ids"] == [[*ids, 63]]
    both = of([{"prompt": "ab", "completion": "c"}], tokenizer=letters)[0]
    assert both["labels"] == [[-100, -100, ord("c") % 61, 63]]
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    chat = of([{"messages": [user, answer]}], tokenizer=letters)[0]
    assert chat["input_ids"] == [letters("u:x;a:y;")["input_ids"]]
    asked = of([{"prompt": [user], "completion": [answer]}], tokenizer=letters)[0]
    assert asked["labels"] == [[-100] * 6 + letters("y;")["input_ids"]]
    masked = of([{"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "text": "abc"}])[0]
    assert masked["labels"] == [[-100, 2, 3]]


def test_rows_are_padded_cut_and_left_out() -> None:
    found = of(["abcd", "", "a"], tokenizer=Letters(), batch_size=2, max_length=3)
    assert found == [{"input_ids": [[36, 37, 38], [36, 63, 63]], "attention_mask": [[1, 1, 1], [1, 0, 0]]}]
    rows = [{"input_ids": [1, 2], "labels": [1, -100]}, {"input_ids": [1, 2], "labels": [-100, 2]}]
    assert [batch["labels"] for batch in of(rows, learn=True)] == [[[-100, 2]]]
    assert of([{"input_ids": [1]}, {"input_ids": [1, 2], "labels": [-100, 2]}], batch_size=2)[0]["labels"] == [
        [1, -100],
        [-100, 2],
    ]


def test_datasets_and_loaders_are_read(tiny: str) -> None:
    datasets = pytest.importorskip("datasets")

    class Mapped(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(ROWS)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return ROWS[index] if index < len(ROWS) else {}["past the end"]

    model = load(tiny)
    expected = calibrate(model, ROWS, EVAConfig(**ALL), batch_size=2)
    loader = DataLoader(ROWS, batch_size=2, collate_fn=lambda rows: next(batches(rows, batch_size=2)))
    for data in (datasets.Dataset.from_list(ROWS), Mapped(), loader, list(loader)):
        assert equal(calibrate(model, data, EVAConfig(**ALL), batch_size=2), expected)
    assert calibrate(model, loader, EVAConfig(**ALL), samples=3).seen == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a text", "put it in a list"),
        ([], "at least one row"),
        ([3], "Found int"),
        ([{"sentence": "x"}], "rename its columns"),
        (["x"], "need a `tokenizer`"),
        ([{"input_ids": [1, 2], "labels": [1]}], "equally long"),
        ([{"input_ids": torch.ones(2, 3), "text": ["a", "b"]}], "dictionary of tensors"),
        ([{"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 1, 3, 3)}], r"of shape \(batch, tokens\)"),
    ],
)
def test_data_of_another_form_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(batches(data))


def test_messages_need_a_template() -> None:
    letters = Letters()
    letters.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        list(batches([{"messages": [{"role": "user", "content": "x"}]}], letters))


@pytest.mark.real
def test_texts_on_a_real_model() -> None:
    from base_model import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    texts = [f"Question: what is {i} plus {i + 3}? Answer: {2 * i + 3}." for i in range(4)]
    config = CorDAConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"])
    found = calibrate(model, texts, config, tokenizer=tokenizer, batch_size=2)
    assert found.seen == 4
    before = logits(model, torch.arange(1000, 1024)[None])
    wrapped = get_peft_model(model, config)
    torch.testing.assert_close(logits(wrapped, torch.arange(1000, 1024)[None]), before)
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]} for text in texts
    ]
    steps = calibrate(
        model := AutoModelForCausalLM.from_pretrained(smollm2()),
        chats,
        LoRASBConfig(**ALL | {"target_modules": ["v_proj"]}),
        tokenizer=tokenizer,
    )
    assert len(steps.names) == model.config.num_hidden_layers


def test_a_run_that_goes_on_takes_its_ranks_from_the_file(tiny: str, tmp_path: Path) -> None:
    """A trainer that resumes makes the adapter from the script's config, uncalibrated, and loads the file into it."""
    model = get_peft_model(load(tiny), EVAConfig(**ALL))
    calibrate(model, ROWS)
    move(model)
    model.save_pretrained(str(tmp_path))
    ranks = model.peft_config["default"].rank_pattern
    assert len(ranks) < 14
    again = get_peft_model(load(tiny), EVAConfig(**ALL))
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert again.peft_config["default"].rank_pattern == ranks
    assert torch.equal(logits(again), logits(model))


def test_a_file_of_more_modules_is_not_gone_on_with_for_fewer(tmp_path: Path) -> None:
    path, data = tmp_path / "s", [{"input": torch.randn(1, 8, 24)} for _ in range(8)]
    calibrate(stack(), data, CorDAConfig(target_modules=["0", "2"]), path=path, samples=4)
    with pytest.raises(ValueError, match="going on would lose them"):
        calibrate(stack(), data, CorDAConfig(target_modules=["0"]), path=path, samples=8)
    assert set(Statistics.load(path).names) == {"0", "2"}


def test_statistics_are_unpickled_without_their_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    model = get_peft_model(stack(), CorDAConfig(r=2, target_modules=["0", "2"]))
    calibrate(model, [{"input": torch.randn(1, 8, 24)}], path=path)
    pickled = pickle.dumps(model)
    path.unlink()
    x = torch.randn(3, 24)
    assert torch.equal(pickle.loads(pickled)(x), model(x))


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
