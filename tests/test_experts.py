"""Stacked experts (`target_parameters`) of tiny models: (experts, out, in) in one, (experts, in, out) in the other."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import QUANTIZED, learning, logits, move, tokens
from members import MEMBERS, VARIANTS, Member
from peft import LoraConfig, PeftModel, get_model_status, get_peft_model
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from peft_kasa import (
    CorDAConfig,
    EVAConfig,
    KaSAConfig,
    LoRAXSConfig,
    PiSSAConfig,
    SpectralConfig,
    export_lora,
    hotswap_adapter,
    penalty,
)
from peft_kasa.adapter.experts.expert import SpectralExpert
from peft_kasa.adapter.experts.wrapper import SpectralExperts
from peft_kasa.adapter.layer import SpectralLinear
from peft_kasa.adapter.starting import all_layers
from peft_kasa.spectral import Engine

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}


def mixtral(**given: Any) -> nn.Module:
    """Experts as (experts, out, in)."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES | given)).eval()


def gpt_oss(**given: Any) -> nn.Module:
    """Experts as (experts, in, out), with biases."""
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(head_dim=16, **SIZES | given)).eval()


MODELS: dict[str, Callable[..., nn.Module]] = {"mixtral": mixtral, "gpt_oss": gpt_oss}
each_model = pytest.mark.parametrize("base", MODELS.values(), ids=MODELS)
FROM_WEIGHTS = [member for member in (*MEMBERS, *VARIANTS) if not member.config_class.needs]
CASES = [
    pytest.param(member, base, id=f"{member}-{name}")
    for member in FROM_WEIGHTS
    for name, base in MODELS.items()
    if member in MEMBERS or base is gpt_oss
]
each_member = pytest.mark.parametrize("member", FROM_WEIGHTS, ids=str)


def config(member: Member, **given: Any) -> SpectralConfig:
    return member.config(**{"target_modules": [], "target_parameters": STACKS} | given)


def adapted(base: nn.Module, kind: type[SpectralConfig] = PiSSAConfig, **given: Any) -> Any:
    return get_peft_model(base, kind(**{"r": 4, "target_modules": [], "target_parameters": STACKS} | given)).eval()


def moved(base: nn.Module, kind: type[SpectralConfig] = PiSSAConfig, **given: Any) -> Any:
    model = adapted(base, kind, **given)
    move(model)
    return model


def experts(model: nn.Module) -> Iterator[SpectralExpert]:
    return (layer for layer in all_layers(model) if isinstance(layer, SpectralExpert))


def stacks(model: nn.Module) -> dict[str, Tensor]:
    """The experts' parameters, copied."""
    named = ((name.replace(".base_layer", ""), value) for name, value in model.named_parameters())
    return {name[-40:]: value.detach().clone() for name, value in named if value.ndim == 3}


def unchanged(model: nn.Module, base: nn.Module) -> bool:
    before, after = stacks(base), stacks(model)
    return [*before.values()] != [] and all(map(torch.equal, before.values(), after.values()))


# The start, what is computed, and learning -----------------------------------------------------------------------


@pytest.mark.parametrize(("member", "base"), CASES)
def test_the_contract(member: Member, base: Callable[..., nn.Module], tmp_path: Path) -> None:
    plain, model = logits(base()), get_peft_model(base(), config(member))
    assert len(list(experts(model))) == 2 * 2 * 3
    if member.identity:
        torch.testing.assert_close(logits(model), plain, atol=1e-6, rtol=0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.rpartition(".")[2] in member.learns)
    losses = fit(model, 20, min(member.rate, 0.1))
    assert losses[-1] < losses[0]
    assert all(value.grad is not None for value in learning(model))
    trained = logits(model)
    assert not torch.equal(trained, plain)
    torch.testing.assert_close(logits(written(model, base())), trained, atol=1e-5, rtol=1e-4)

    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)
    assert unchanged(model, base())

    model.save_pretrained(str(tmp_path / "ours"))
    assert torch.equal(logits(PeftModel.from_pretrained(base(), str(tmp_path / "ours"))), trained)
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(base(), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(lora), trained, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(model.unload()), plain)


def fit(model: nn.Module, count: int, rate: float) -> list[float]:
    """The losses of Adam on one batch."""
    optimizer, losses = torch.optim.Adam(learning(model.train()), lr=rate), []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def written(model: nn.Module, base: nn.Module) -> nn.Module:
    """The base model, every expert's update written into it."""
    parameters = dict(base.named_parameters())
    for expert in experts(model):
        delta = expert.get_delta_weight("default")
        stack, _, index = expert.name.rpartition(".")
        parameters[stack][int(index)] += delta if "Mixtral" in type(base).__name__ else delta.T
    return base


@each_member
def test_every_expert_starts_as_a_linear_layer_of_its_matrix(member: Member) -> None:
    base, model = gpt_oss(), get_peft_model(gpt_oss(), config(member))
    parameters = dict(base.named_parameters())
    for expert in list(experts(model))[1::4]:
        stack, _, index = expert.name.rpartition(".")
        matrix = parameters[stack][int(index)].detach().T.contiguous()
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        linear.weight = nn.Parameter(matrix)
        alone = SpectralLinear(linear, expert.name)
        alone.reserve("default", config(member))
        alone.start("default", Engine())
        for name, value in alone.slots("default").items():
            torch.testing.assert_close(expert.slots("default")[name], value, atol=1e-5, rtol=1e-4)


@each_model
@pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "batched_mm"])
def test_every_way_to_multiply_gives_the_same(base: Callable[..., nn.Module], kernel: str) -> None:
    model = moved(base(experts_implementation=kernel), KaSAConfig)
    assert model.config._experts_implementation == kernel
    torch.testing.assert_close(logits(model), logits(written(model, base())), atol=1e-5, rtol=1e-4)


def test_half_precision_autocast_and_checkpointing() -> None:
    model = moved(mixtral().bfloat16(), KaSAConfig)
    assert logits(model).dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in learning(model))
    model = moved(mixtral(), KaSAConfig)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(logits(model), logits(written(model, mixtral())), atol=0.3, rtol=0.1)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        return [value.grad.clone() for value in learning(model) if value.grad is not None]

    before = gradients()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert len(before) == 3 * 12
    assert all(map(torch.equal, before, gradients()))


def test_compiled_they_compute_the_same() -> None:
    model = moved(mixtral())
    expected, block = logits(model), model.get_base_model().model.layers[1]
    block.mlp = torch.compile(block.mlp, backend="eager")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


# Several adapters, and what else PEFT does ------------------------------------------------------------------------


def test_several_adapters_on_one_base() -> None:
    model = moved(mixtral(), KaSAConfig, target_modules=["q_proj"])
    first = logits(model)
    model.add_adapter("second", PiSSAConfig(r=2, target_modules="all-linear", target_parameters=STACKS[1:]))
    assert not any("experts" in name for name in model.peft_config["second"].target_modules)
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), first, atol=1e-5, rtol=1e-4)  # a PiSSA starts at nothing
    move(model)
    both = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)
    model.set_adapter("second")
    second = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert get_model_status(model).available_adapters == ["second"]
    assert unchanged(model, mixtral())


@pytest.mark.parametrize("names", [["down_proj", "q_proj"], r".*(down|q)_proj.*"])
def test_modules_named_as_stacks_do_not_mean_the_adapters_of_stacks(names: Any) -> None:
    model = adapted(mixtral())
    model.add_adapter("second", PiSSAConfig(r=2, target_modules=names))
    assert {layer.name for layer in all_layers(model) if "second" in layer.adapters} == {
        f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)
    }


@each_model
@pytest.mark.parametrize("uniform", [True, False])
def test_export_beside_linear_layers_of_other_ranks(
    base: Callable[..., nn.Module], uniform: bool, tmp_path: Path
) -> None:
    patterns: dict[str, Any] = {
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.0.mlp.experts.down_proj": 6},
    }
    model = moved(base(), KaSAConfig, r=3, target_modules=["q_proj"], **patterns)
    ranks = {layer.pattern_name.rpartition(".")[2]: layer.adapters["default"].rank for layer in all_layers(model)}
    assert ranks == {"q_proj": 3, "gate_up_proj": 3, "down_proj": 2}
    export_lora(model, tmp_path, uniform=uniform)
    lora = PeftModel.from_pretrained(base(), str(tmp_path))
    torch.testing.assert_close(logits(lora), logits(model), atol=1e-5, rtol=1e-4)
    assert isinstance(lora.peft_config["default"], LoraConfig)


def test_a_weighted_sum_of_adapters(tmp_path: Path) -> None:
    model = moved(mixtral(), KaSAConfig, target_modules=["q_proj"])
    model.add_adapter("second", LoRAXSConfig(r=4, std=1.0, target_modules=[], target_parameters=STACKS[:1]))
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    errors = model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="cat")
    assert len(errors) == 2 + 12
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-4)
    both = logits(model)
    model.save_pretrained(str(tmp_path), selected_adapters=["both"])
    assert torch.equal(logits(PeftModel.from_pretrained(mixtral(), str(tmp_path / "both"))), both)


def test_the_regulariser_counts_every_expert() -> None:
    total = penalty(moved(mixtral(), KaSAConfig, reduction="sum"))
    model = moved(mixtral(), KaSAConfig)
    every = list(experts(model))
    each = [model.peft_config["default"].penalty(expert.value("default")) for expert in every]
    torch.testing.assert_close(total, sum(each, torch.zeros(())))
    torch.testing.assert_close(penalty(model), total / len(every))
    before = [value.detach().clone() for value in learning(model)]
    optimizer = torch.optim.SGD(learning(model), lr=1.0)
    for value in learning(model):
        value.grad = torch.zeros_like(value)
    optimizer.step()  # the regulariser alone
    assert not any(map(torch.equal, before, learning(model)))


def test_files_in_every_way(tmp_path: Path) -> None:
    model = moved(mixtral(), LoRAXSConfig, save_frames=False)
    trained = logits(model)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(mixtral(), str(tmp_path))), trained)
    lean = PeftModel.from_pretrained(mixtral(), str(tmp_path), low_cpu_mem_usage=True)
    assert torch.equal(logits(lean), trained)
    alone = mixtral()
    alone.load_adapter(str(tmp_path))  # type: ignore[operator]
    assert torch.equal(logits(alone), trained)
    other = adapted(mixtral(), LoRAXSConfig, save_frames=False)
    hotswap_adapter(other, str(tmp_path))
    assert torch.equal(logits(other), trained)
    strange = mixtral()
    with torch.no_grad():
        strange.model.layers[1].mlp.experts.down_proj[2].normal_()  # type: ignore[union-attr, index, operator]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj\.2: the adapter was trained on another"):
        PeftModel.from_pretrained(strange, str(tmp_path))


def test_threads_do_not_see_each_others_stacks() -> None:
    model = moved(mixtral())
    with torch.no_grad():
        expected = logits(model)
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: logits(model), range(30)))
    assert all(torch.allclose(one, expected, atol=1e-6) for one in found)


def test_the_experts_own_attributes_are_there() -> None:
    wrapper = next(module for module in adapted(mixtral()).modules() if isinstance(module, SpectralExperts))
    assert wrapper.num_experts == wrapper.base_layer.num_experts
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        wrapper.nothing_of_this_name  # noqa: B018


def test_copies_are_of_their_own() -> None:
    model = moved(mixtral())
    trained, buffer = logits(model), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other), trained)
        expert = next(experts(other))
        with torch.no_grad():
            expert.base_layer.weight.zero_()
        assert not torch.equal(logits(other), trained)
    assert torch.equal(logits(model), trained)


# 4-bit bases, and refusals ----------------------------------------------------------------------------------------


def test_in_a_4_bit_model_the_experts_are_in_float_and_adapted_as_such(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    model = MixtralForCausalLM.from_pretrained(
        tmp_path, quantization_config=QUANTIZED["nf4"], dtype=torch.float32, device_map="cpu"
    )
    plain = logits(model)
    model = adapted(model, target_modules=["q_proj"])
    torch.testing.assert_close(logits(model), plain, atol=1e-6, rtol=0)
    losses = fit(model, 5, 0.01)
    assert losses[-1] < losses[0]
    model.eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


def test_quantised_experts_are_refused_by_name() -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = mixtral()
    replace_parameter_4bit(model.model.layers[1].mlp.experts, "down_proj")
    with pytest.raises(TypeError, match=r"layers\.1\.mlp\.experts\.down_proj: .*bitsandbytes.*in float"):
        adapted(model)
    model = mixtral()
    model.model.layers[0].mlp.experts.down_proj.data = torch.zeros(3, 64, 48, dtype=torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"layers\.0\.mlp\.experts\.down_proj: .*Found torch.float8_e4m3fn"):
        adapted(model)
    assert not any(isinstance(module, SpectralExperts) for module in model.modules())


REFUSED: list[tuple[type[SpectralConfig], dict[str, Any], str]] = [
    (CorDAConfig, {}, r"None for corda: scaled inputs are gathered module by module.*PiSSA"),
    (EVAConfig, {}, r"None for eva: inputs are gathered"),
    (PiSSAConfig, {"dropout": 0.1}, r"dropout has to be 0 with target_parameters.*Found 0\.1"),
    (PiSSAConfig, {"rank_budget": 0.9}, r"rank_budget has to be None with target_parameters.*rank_pattern.*Found 0\.9"),
    (PiSSAConfig, {"target_parameters": "experts.down_proj"}, r"has to be a list of names"),
    (PiSSAConfig, {"r": 60}, r"experts\.gate_up_proj\.0|experts\.down_proj\.0: r has to be at most .*48"),
]


@pytest.mark.parametrize(("kind", "given", "message"), REFUSED)
def test_what_does_not_go_is_refused(kind: type[SpectralConfig], given: dict[str, Any], message: str) -> None:
    base = mixtral()
    with pytest.raises(ValueError, match=message):
        adapted(base, kind, **given)
    assert not any(isinstance(module, SpectralExperts) for module in base.modules())


def test_other_parameters_are_refused() -> None:
    base = mixtral()
    with pytest.raises(
        TypeError, match=r"mlp\.gate\.weight: target_parameters takes stacks.*\(3, 64\).*modules_to_save"
    ):
        adapted(base, target_parameters=["experts.down_proj", "gate.weight"])
    assert not any(isinstance(module, SpectralExperts) for module in base.modules())


def test_mixed_batches_are_refused() -> None:
    model = adapted(mixtral())
    with pytest.raises(ValueError, match=r"without adapted experts.*set_adapter.*layers\.0\.mlp\.experts"):
        model(input_ids=tokens(), adapter_names=["default", "__base__"])
