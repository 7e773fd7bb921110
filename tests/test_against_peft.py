"""CorDA, EVA and LoRA-XS against PEFT's own (PSOFT without its constraints is LoRA-XS), on the stack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases import stack
from peft import LoraConfig, PeftModel, PsoftConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import Tensor, nn

from peft_kasa import CorDAConfig, EVAConfig, LoRAXSConfig, SpectralLinear, calibrate

R, NAMES = 4, ["0", "2", "4"]
DATA = [
    {"input": torch.randn(1, 32, 24, generator=torch.Generator().manual_seed(seed)).exp() - 1} for seed in range(12)
]


def layers(model: PeftModel) -> list[Any]:
    return [model.base_model.model[int(name)] for name in NAMES]


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(("method", "mode"), [("ipm", "instruction"), ("kpm", "knowledge")])
@pytest.mark.parametrize("alpha", [4, 6])
def test_corda_is_pefts(method: str, mode: str, alpha: int) -> None:
    """The same factors up to signs, and the same outputs; PEFT's base is rewritten, and its C inverted."""
    theirs: Any = stack()
    given = {"corda_config": CordaConfig(corda_method=method), "init_lora_weights": "corda"}
    config = LoraConfig(r=R, lora_alpha=alpha, target_modules=NAMES, **given)
    preprocess_corda(theirs, config, lambda: [theirs(row["input"]) for row in DATA])
    theirs = get_peft_model(theirs, config)
    ours = get_peft_model(stack(), CorDAConfig(r=R, alpha=alpha, target_modules=NAMES, mode=mode))  # type: ignore[arg-type]
    calibrate(ours, DATA)
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    assert distance(theirs(x), stack()(x)) < 1e-4
    assert torch.equal(ours(x), stack()(x))
    for layer, lora in zip(layers(ours), layers(theirs), strict=True):
        found = layer.value("default")
        a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
        sign = (found.left * b).sum(0).sign()
        assert distance(found.left * sign, b) < 2e-3
        assert distance(found.right * sign[:, None], a) < 2e-3
        assert torch.equal(layer.base_layer.weight, stack()[int(layer.name)].weight)
        assert distance(lora.base_layer.weight, layer.base_layer.weight) > 1e-2


def test_corda_is_nearer_to_the_exact_one_than_pefts() -> None:
    """Inputs of which one direction is 1e4 times another, as language models' are: PEFT's inverse loses digits."""
    scales = torch.logspace(0, -4, 24)
    data = [{"input": row["input"] * scales} for row in DATA]
    base = nn.Sequential(nn.Linear(24, 24))
    weight = base[0].weight.detach().clone()
    theirs: Any = nn.Sequential(nn.Linear(24, 24))
    theirs.load_state_dict(base.state_dict())
    config = LoraConfig(
        r=R, lora_alpha=R, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm")
    )
    preprocess_corda(theirs, config, lambda: [theirs(row["input"]) for row in data])
    theirs = get_peft_model(theirs, config).base_model.model[0]
    ours = get_peft_model(base, CorDAConfig(r=R, target_modules=["0"], mode="knowledge", damping=1e-6))
    statistics = calibrate(ours, data)
    layer: SpectralLinear = ours.base_model.model[0]
    c = statistics.evidence("0").matrix() / statistics.seen
    c = c + 1e-6 * c.diagonal().mean() * torch.eye(24)
    u = torch.linalg.svd(weight.double() @ c).U[:, -R:]
    exact = u @ u.T @ weight.double()
    assert distance(layer.value("default").dense(), exact) < 1e-5
    assert theirs.lora_A["default"].weight.shape == (R, 24)


def test_eva_is_pefts_where_that_sees_all_at_once() -> None:
    """PEFT's incremental PCA is exact over one batch. The same axes, and the same ranks for the same budget."""
    batch = {"input": torch.cat([row["input"] for row in DATA])}
    config = LoraConfig(
        r=R, lora_alpha=R, target_modules=NAMES, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.5)
    )
    theirs = get_peft_model(stack(), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(
        theirs,
        [batch] * 3,
        forward_fn=lambda model, given: model(given["input"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    ours = get_peft_model(stack(), EVAConfig(r=R, alpha=R, target_modules=NAMES))
    calibrate(ours, [batch])
    for layer, lora in zip(layers(ours), layers(theirs), strict=True):
        if not isinstance(layer, SpectralLinear):
            assert "default" not in getattr(lora, "lora_A", {})
            continue
        found, a = layer.value("default").right, lora.lora_A["default"].weight
        assert found.shape == a.shape
        sign = (found * a).sum(1).sign()
        assert distance(found * sign[:, None], a) < 1e-2
        assert layer.adapters["default"].scale == pytest.approx(lora.scaling["default"])


def test_lora_xs_is_psoft_without_its_constraints() -> None:
    """PSOFT's core R is K + I in the singular directions, with the values on the left: W + L (R - I) R0."""
    config = PsoftConfig(
        r=R, psoft_alpha=R, target_modules=NAMES, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False
    )
    theirs = get_peft_model(stack(), config)
    ours = get_peft_model(stack(), LoRAXSConfig(r=R, alpha=R, target_modules=NAMES, sigma="left", std=0.0))
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    assert distance(theirs(x), ours(x)) < 1e-5
    for layer, other in zip(layers(ours), layers(theirs), strict=True):
        core = 0.3 * torch.randn(R, R, generator=torch.Generator().manual_seed(2))
        slots = layer.slots("default")
        rows, columns = other._get_psoft_ab_cache_buffers("default")
        assert distance(columns @ rows, slots["left"] @ slots["right"]) < 1e-4
        turn = torch.linalg.lstsq(slots["left"], columns).solution  # their signs
        with torch.no_grad():
            other.psoft_R["default"].weight.copy_(torch.eye(R) + core)
            slots["core"].copy_(turn @ core @ torch.linalg.inv(turn))
    assert distance(ours(x), theirs(x)) < 1e-4
    assert distance(ours(x), stack()(x)) > 1e-2
