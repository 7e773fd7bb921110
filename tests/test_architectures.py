"""Models that are no decoders: encoder-decoder, feature extraction, classification of texts and of tokens; experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bases import learning, tokens
from members import FORMS, Member
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_kasa import KaSAConfig, PiSSAConfig, export_lora


def t5() -> nn.Module:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


def bert(kind: type) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return kind(BertConfig(vocab_size=64, **sizes, **off, num_labels=3, initializer_range=0.2))


HEADS = ["classifier", "score"]
ROWS = tokens(4, 8)
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], str]] = {
    "SEQ_2_SEQ_LM": (t5, {"labels": tokens(4, 6, seed=1)}, "logits"),
    "FEATURE_EXTRACTION": (lambda: bert(BertModel), {}, "last_hidden_state"),
    "SEQ_CLS": (lambda: bert(BertForSequenceClassification), {"labels": ROWS[:, 0] % 3}, "logits"),
    "TOKEN_CLS": (lambda: bert(BertForTokenClassification), {"labels": ROWS % 3}, "logits"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind][0]().eval()


def run(model: nn.Module, kind: str) -> tuple[Tensor, Tensor]:
    """The output, and the loss: of features, the distance of each row from the next one."""
    _, labels, output = KINDS[kind]
    found = model(input_ids=ROWS, **labels)
    return found[output], found.loss if labels else (found[output] - found[output].roll(1, 0).detach()).square().mean()


@torch.no_grad()
def outputs(model: nn.Module, kind: str) -> Tensor:
    return run(model.eval(), kind)[0]


def train(model: nn.Module, kind: str, rate: float) -> list[float]:
    optimizer, losses = torch.optim.Adam(learning(model.train()), lr=rate), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = run(model, kind)[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@each_kind
@pytest.mark.parametrize("member", FORMS, ids=str)
def test_every_kind_of_model_can_be_adapted(kind: str, member: Member, tmp_path: Path) -> None:
    model = get_peft_model(base(kind), member.config(task_type=kind, exclude_modules=["classifier"]))
    plain = outputs(base(kind), kind)
    if member.identity:
        assert torch.equal(outputs(model, kind), plain)
    losses = train(model, kind, min(member.rate, 0.05))
    assert losses[-1] < losses[0]
    trained = outputs(model, kind)
    assert not torch.equal(trained, plain)
    model.save_pretrained(str(tmp_path / "ours"))
    again = PeftModel.from_pretrained(base(kind), str(tmp_path / "ours"))
    assert type(again) is type(model)
    assert torch.equal(outputs(again, kind), trained)
    export_lora(model, tmp_path / "lora", uniform=not model.peft_config["default"].beyond)
    lora = PeftModel.from_pretrained(base(kind), str(tmp_path / "lora"))
    torch.testing.assert_close(outputs(lora, kind), trained, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs(again.merge_and_unload(), kind), trained, atol=1e-5, rtol=1e-4)


def test_a_tasks_heads_are_named_once_however_often_an_adapter_is_saved(tmp_path: Path) -> None:
    """PEFT appends them to modules_to_save whenever a model is wrapped."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return KINDS["SEQ_CLS"][0]()

    model = get_peft_model(base(), KaSAConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["modules_to_save"] == HEADS
        model = PeftModel.from_pretrained(base(), tmp_path / name)


def mixtral() -> MixtralForCausalLM:
    """Experts stacked in tensors of three dimensions."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, **sizes, **experts))


def test_around_experts_the_linear_layers_are_adapted() -> None:
    model = get_peft_model(mixtral(), PiSSAConfig(r=2, target_modules="all-linear"))
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    assert model.targeted_module_names[:4] == attention
    assert not any("experts" in name for name in model.targeted_module_names)


def test_stacked_experts_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"layers\.0\.mlp\.experts: MixtralExperts is not a linear layer"):
        get_peft_model(mixtral(), KaSAConfig(r=2, target_modules=["experts"]))
