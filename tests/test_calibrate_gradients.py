"""Gradients of calibration data: autograd's own, in groups or in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bases import load, logits
from calibrating import ALL, LAYER, ROWS, close, equal
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_kasa import EVAConfig, LoRAOneConfig, LoRASBConfig, calibrate
from peft_kasa.adapter.base.base_weight import BaseWeight
from peft_kasa.calibration.batches import batches

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

    start = module.start_layers

    def counting(layers: list[Any], adapter: str) -> None:
        held.append(sum(4 * layer.in_features * layer.out_features for layer in layers))
        start(layers, adapter)

    monkeypatch.setattr(module, "start_layers", counting)
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
