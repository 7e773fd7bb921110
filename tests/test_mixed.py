"""Batches whose rows have adapters of their own: each row comes out as it does with its adapter alone."""

from __future__ import annotations

import pytest
import torch
from bases import load, logits, move, tokens
from members import MEMBERS, Member
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from peft_kasa import CorDAConfig, KaSAConfig

BASE = "__base__"
each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)
kasa, pissa, svf = (next(member for member in MEMBERS if member.name == name) for name in ("kasa", "pissa", "svf"))


def adapted(base: nn.Module, *members: Member, **given: object) -> PeftModel:
    """An adapter of each member on one base, called m0, m1, ..., all of them moved."""
    model = get_peft_model(base, members[0].config(**given), adapter_name="m0")
    for index, member in enumerate(members[1:], 1):
        model.add_adapter(f"m{index}", member.config(**given))
    for index in range(len(members)):
        model.set_adapter(f"m{index}")
        move(model, 0.2, seed=index)
    return model.eval()


@torch.no_grad()
def alone(model: PeftModel, name: str, ids: torch.Tensor) -> torch.Tensor:
    """The logits of rows that all have one adapter."""
    if name == BASE:
        with model.disable_adapter():
            return logits(model, ids)
    model.set_adapter(name)
    return logits(model, ids)


@torch.no_grad()
def check(model: PeftModel, names: list[str], bound: float = 1e-6) -> None:
    """A mixed batch against each of its rows alone."""
    ids = tokens(len(names))
    out = model.eval()(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        expected = alone(model, name, ids[row : row + 1])[0]
        assert (out[row] - expected).float().norm() <= bound * expected.float().norm(), (row, name)
    assert not any(module._forward_pre_hooks for module in model.base_model.modules() if hasattr(module, "adapters"))


@each_member
def test_rows_are_as_with_their_adapter_alone(member: Member, tiny: str) -> None:
    """Two of the member's, one of another method, none; rows of one adapter are not next to each other."""
    model = adapted(load(tiny), member, member, pissa)
    check(model, ["m1", BASE, "m0", "m2", "m1", "m0", BASE])
    assert not torch.allclose(alone(model, "m0", tokens()), alone(model, "m1", tokens()), atol=1e-3)


@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
def test_all_members_in_one_batch(kind: str, tiny: str) -> None:
    model = adapted(load(tiny, kind), *MEMBERS)
    check(
        model, [f"m{index}" for index in range(len(MEMBERS))] + [BASE], 0.05 if kind == "int8" else 1e-2
    )  # 8-bit layers choose outlier columns by batch


def test_layers_that_an_adapter_does_not_have_pass(tiny: str) -> None:
    model = get_peft_model(load(tiny), kasa.config(target_modules=["q_proj"]), adapter_name="m0")
    model.add_adapter("m1", svf.config(target_modules=["up_proj"]))
    for name in ("m0", "m1"):
        model.set_adapter(name)
        move(model, 0.2)
    check(model, ["m1", "m0", BASE])
    check(model, [BASE, BASE])


# Generation -----------------------------------------------------------------------------------------------------


def generated(model: PeftModel, ids: torch.Tensor, **given: object) -> torch.Tensor:
    model.eval()
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, pad_token_id=0, **given)


SEARCHES = [
    {"do_sample": False},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2},
    {"generation_config": GenerationConfig(num_beams=3, max_new_tokens=6, pad_token_id=0)},
]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: "-".join(search))
def test_generates_as_with_each_adapter_alone(search: dict[str, object], tiny: str) -> None:
    model, names, ids = adapted(load(tiny), kasa, pissa), ["m1", BASE, "m0"], tokens(3)
    mixed = generated(model, ids, adapter_names=names, **search)
    expected = []
    for row, name in enumerate(names):
        if name != BASE:
            model.set_adapter(name)
        with model.disable_adapter() if name == BASE else torch.no_grad():
            expected.append(generated(model, ids[row : row + 1], **search))
    assert torch.equal(mixed, torch.cat(expected))
    assert not torch.equal(mixed[0], generated(model, ids[:1], **search)[0])


def test_samples_several_sequences_a_row(tiny: str) -> None:
    model = adapted(load(tiny), kasa, pissa)
    out = generated(model, tokens(2), adapter_names=["m0", "m1"], do_sample=True, num_return_sequences=3)
    assert len(out) == 6


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_sees_each_row_once(beams: int) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    targets = {"target_modules": ["q", "v", "wi"]}
    model = adapted(T5ForConditionalGeneration(config).eval(), kasa, pissa, **targets)
    names, ids = ["m1", "m0"], tokens(2)
    mixed = generated(model, ids, adapter_names=names, num_beams=beams)
    for row, name in enumerate(names):
        model.set_adapter(name)
        single = generated(model, ids[row : row + 1], num_beams=beams)[0]
        assert torch.equal(mixed[row, : len(single)], single)


# What else an adapter may have ------------------------------------------------------------------------------------


EXTRAS = [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"embed_tokens": [1, 2, 3, 4, 5]}}]


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: next(iter(extra)))
def test_modules_trained_in_full_go_by_row_too(extra: dict[str, object], tiny: str) -> None:
    check(adapted(load(tiny), kasa, pissa, **extra), ["m1", "m0", "m1"])


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: next(iter(extra)))
@pytest.mark.parametrize("first", [True, False])
def test_modules_that_only_some_train_in_full_are_the_bases_for_others(
    first: bool, extra: dict[str, object], tiny: str
) -> None:
    targets: dict[str, object] = {"target_modules": ["q_proj", "up_proj"]}
    options = (targets | extra, targets) if first else (targets, targets | extra)
    model = get_peft_model(load(tiny), kasa.config(**options[0]), adapter_name="m0")
    model.add_adapter("m1", pissa.config(**options[1]))
    for name in ("m0", "m1"):
        model.set_adapter(name)
        move(model, 0.2)
        check(model, ["m1", "m0", BASE])


# What is refused -------------------------------------------------------------------------------------------------


def refused(model: PeftModel, names: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model(input_ids=tokens(2), adapter_names=names)
    assert not any(module._forward_pre_hooks for module in model.base_model.modules() if hasattr(module, "adapters"))


def test_what_has_no_answer_is_refused(tiny: str) -> None:
    model = adapted(load(tiny), kasa, pissa)
    model.add_adapter("late", CorDAConfig(r=2, target_modules=["q_proj"]))
    refused(model, ["m0", "m7"], r"adapter_names have to be of \['m0', 'm1', 'late', '__base__'\]. Found \['m7'\]")
    refused(model, ["m0"], r"layers\.0\.self_attn\.q_proj: adapter_names.* each of the 2 rows.*Found 1")
    refused(model, ["m0"] * 3, r"each of the 2 rows.*Found 3")
    refused(model, "m0", r"adapter_names has to be a list of names, one for each row.*Found 'm0'")
    refused(model, [0, 1], r"adapter_names has to be a list of names")
    refused(model, ["m0", "late"], r"'late'.*Call calibrate")
    model.train()
    refused(model, ["m0", "m1"], r"adapter_names is for inference: call model\.eval\(\) first")
    model.eval().merge_adapter()
    refused(model, ["m0", "m1"], r"not merged: call unmerge_adapter first. Found \['m1'\]")
    model.unmerge_adapter()
    check(model, ["m0", "m1"])


def test_beams_that_only_the_models_own_config_asks_for_are_refused(tiny: str) -> None:
    model = adapted(load(tiny), kasa, pissa)
    model.generation_config.num_beams = 3
    with pytest.raises(ValueError, match=r"each of the 6 rows.*num_beams.*passed to generate\). Found 2"):
        generated(model, tokens(2), adapter_names=["m0", "m1"])


def test_disabled_adapters_are_disabled_for_every_row(tiny: str) -> None:
    model = adapted(load(tiny), kasa, pissa)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=tokens(2), adapter_names=["m0", "m1"]).logits, logits(load(tiny)))


def test_no_adapter_takes_the_name_of_none(tiny: str) -> None:
    with pytest.raises(ValueError, match="An adapter's name may not be"):
        get_peft_model(load(tiny), KaSAConfig(r=2, target_modules=["q_proj"]), adapter_name=BASE)
