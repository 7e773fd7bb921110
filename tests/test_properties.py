"""What else PEFT's own test-suite checks of a method: docs/peft_properties.md says which test covers which property."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from bases import fresh, learning, load, logits, move, stack, steps, tokens
from members import FORMS, MEMBERS, Member
from peft import (
    PeftConfig,
    PeftModel,
    TaskType,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from peft_kasa import KaSAConfig, SpectralLinear

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)
each_form = pytest.mark.parametrize("member", FORMS, ids=str)
FEW = {"target_modules": ["q_proj", "up_proj"]}


def adapted(member: Member, *names: str, base: nn.Module | None = None, **given: object) -> PeftModel:
    """The tiny model with the member's adapters of these names, all of them moved, each its own way."""
    first, *others = names or ("default",)
    model = get_peft_model(base or fresh(), member.config(**FEW | given), adapter_name=first)
    for name in others:
        model.add_adapter(name, member.config(**FEW | given))
    for seed, name in enumerate((first, *others)):
        model.set_adapter(name)
        move(model, 0.1, seed)
    model.set_adapter(first)
    return model.eval()


def layers(model: nn.Module) -> list[SpectralLinear]:
    return [module for module in model.modules() if isinstance(module, SpectralLinear)]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() < 1e-5 * expected.norm())


# Names, files and configs ---------------------------------------------------------------------------------------


@each_form
def test_adapters_whose_names_hold_one_another_are_saved_alone(member: Member, tmp_path: Path) -> None:
    names = ("default", "default2", "other_default", "foodefault_bar", "efaul", "q_proj", "model")
    model = adapted(member, *names)
    expected = {}
    for name in names:
        model.set_adapter(name)
        expected[name] = logits(model)
        folder = tmp_path / name
        model.save_pretrained(str(folder), selected_adapters=[name])
        path = folder if name == "default" else folder / name
        assert [other.parent for other in folder.rglob("*.safetensors")] == [path]
        own = get_peft_model_state_dict(model, adapter_name=name)
        assert load_file(path / "adapter_model.safetensors").keys() == own.keys()
        assert torch.equal(logits(PeftModel.from_pretrained(fresh(), str(path))), expected[name])
    assert not any(torch.equal(expected["default"], expected[name]) for name in names[1:])


@each_form
def test_loading_with_a_config_at_hand_takes_that_object(member: Member, tmp_path: Path) -> None:
    model = adapted(member)
    model.save_pretrained(str(tmp_path))
    config = PeftConfig.from_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(fresh(), str(tmp_path), config=config)
    assert again.peft_config["default"] is config
    assert config.inference_mode
    assert torch.equal(logits(again), logits(model))
    told = again.load_adapter(str(tmp_path), adapter_name="second")
    assert (told.missing_keys, told.unexpected_keys) == ([], [])


@each_form
@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_learns_where_it_is_asked_to(member: Member, trainable: bool, tmp_path: Path) -> None:
    model = adapted(member, modules_to_save=["lm_head"])
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(fresh(), str(tmp_path), is_trainable=trainable)
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name for name, value in again.named_parameters() if value.requires_grad} == (names if trainable else set())
    assert any("lm_head" in name for name in names)


@each_form
def test_a_state_dict_tells_the_targets_and_is_left_as_it_was(member: Member) -> None:
    model = adapted(member)
    state = get_peft_model_state_dict(model)
    kept = {key: value.clone() for key, value in state.items()}
    bare = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    other = inject_adapter_in_model(member.config(**FEW), fresh(), state_dict=bare)
    assert [layer.name for layer in layers(other)] == [layer.name for layer in layers(model)]
    set_peft_model_state_dict(other, bare)
    assert torch.equal(logits(other), logits(model))
    again = get_peft_model(fresh(), member.config(**FEW))
    set_peft_model_state_dict(again, state)
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[key], value) for key, value in kept.items())


@each_member
def test_configs_go_through_a_file_and_know_pefts_task_types(member: Member, tmp_path: Path) -> None:
    for task in [None, *TaskType]:
        config = member.config(task_type=task, target_modules={"q_proj", "up_proj"}, layers_to_transform=0)
        config.save_pretrained(str(tmp_path))
        again = PeftConfig.from_pretrained(str(tmp_path))
        assert type(again) is type(config)
        assert again.task_type == task
        assert again.peft_version
        assert (set(again.target_modules), again.layers_to_transform) == ({"q_proj", "up_proj"}, 0)
    with pytest.raises(ValueError, match="Invalid task type"):
        member.config(task_type="BEST_TASK")


# The base and the adapter, apart --------------------------------------------------------------------------------


@each_form
def test_the_bases_state_dict_can_be_taken_and_put_back(member: Member) -> None:
    model, plain = adapted(member, modules_to_save=["lm_head"]), fresh().state_dict()
    state = get_base_model_state_dict(model)
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[key], value) for key, value in plain.items())
    expected = logits(model)
    set_base_model_state_dict(model, {key: value + 1 for key, value in plain.items()})
    assert not torch.equal(logits(model), expected)
    set_base_model_state_dict(model, plain)
    assert torch.equal(logits(model), expected)


@each_form
def test_embeddings_may_be_the_input(member: Member) -> None:
    model = adapted(member)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(tokens())).logits
    assert torch.equal(embedded, logits(model))


@each_form
def test_generates_in_half_precision_and_from_a_positional_argument(member: Member) -> None:
    model = get_peft_model(fresh().half(), member.config(**FEW)).half()
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens(), **given), model.generate(input_ids=tokens(), **given))
    assert torch.isfinite(logits(model.merge_and_unload())).all()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_pefts_preparation_of_a_quantised_base_leaves_training_as_it_is(kind: str, tiny: str) -> None:
    base = prepare_model_for_kbit_training(load(tiny, kind), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, KaSAConfig(r=2, **FEW))
    before = [value.detach().clone() for value in learning(model)]
    steps(model)
    assert all(not torch.equal(value, old) for value, old in zip(learning(model), before, strict=True))


# Switching ------------------------------------------------------------------------------------------------------


@each_form
def test_disabling_is_reentrant_and_ends_as_it_began(member: Member) -> None:
    model, plain = adapted(member, "default", "second"), logits(fresh())
    expected = logits(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), expected)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model), plain)


@each_form
def test_learning_can_be_switched_for_each_adapter(member: Member) -> None:
    model = adapted(member, "default", "second")
    model.set_requires_grad("second")
    learn = {name: [p.requires_grad for p in layers(model)[0].slots(name).values()] for name in ("default", "second")}
    assert learn["default"] == learn["second"]
    model.set_requires_grad("default", requires_grad=False)
    assert [name for name, value in model.named_parameters() if value.requires_grad and ".default" in name] == []
    assert sum(learn["second"]) == len(member.learns)


@each_form
def test_a_merged_adapter_is_not_deleted(member: Member) -> None:
    model = adapted(member, "default", "second")
    model.merge_adapter(["default"])
    merged = logits(model)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("third")
    assert torch.equal(logits(model), merged)
    model.delete_adapter("second")
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model), logits(adapted(member)))


@each_form
def test_a_status_that_differs_between_layers_is_irregular(member: Member) -> None:
    model = adapted(member, "default", "second")
    layers(model)[0].set_adapter("second")
    assert model.get_model_status().active_adapters == "irregular"
    layers(model)[0].set_adapter("default")
    layers(model)[0].enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    layers(model)[0].enable_adapters(True)
    assert (model.get_model_status().active_adapters, model.get_model_status().enabled) == (["default"], True)


NOWHERE = [{"target_modules": ["nowhere"]}, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}]


@pytest.mark.parametrize("given", NOWHERE, ids=str)
@each_form
def test_a_second_adapter_that_finds_no_module_leaves_the_model_as_it_was(
    member: Member, given: dict[str, object]
) -> None:
    model = adapted(member)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"not found in the base|No modules were targeted"):
        model.add_adapter("second", member.config(**given))
    assert [*model.peft_config] == ["default"]
    assert torch.equal(logits(model), expected)
    model.add_adapter("second", member.config(target_modules="all-linear"))
    assert sum("second" in layer.adapters for layer in layers(model)) == 14


def test_pefts_mixed_model_refuses_the_family_by_name() -> None:
    """Members mix on a plain PeftModel, with one another."""
    with pytest.raises(ValueError, match="'PEFT_KASA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(fresh(), KaSAConfig(r=2, **FEW), mixed=True)


# Merging --------------------------------------------------------------------------------------------------------


@each_member
def test_merging_one_by_one_is_merging_at_once(member: Member) -> None:
    model, names = adapted(member, "default", "second"), ["default", "second"]
    model.base_model.set_adapter(names)
    expected, plain = logits(model), [layer.base.matrix().clone() for layer in layers(model)]
    model.merge_adapter(names)
    assert close(logits(model), expected)
    at_once = [layer.base.matrix().clone() for layer in layers(model)]
    model.unmerge_adapter()
    for name in names:
        model.merge_adapter([name])
    assert layers(model)[0].merged_adapters == names
    assert close(logits(model), expected)
    for layer, weight in zip(layers(model), at_once, strict=True):
        assert close(layer.base.matrix(), weight)
    model.unmerge_adapter()
    assert all(torch.equal(layer.base.matrix(), weight) for layer, weight in zip(layers(model), plain, strict=True))


@each_form
def test_merging_again_or_in_training_mode_changes_nothing(member: Member) -> None:
    model = adapted(member, dropout=0.5)
    model.merge_adapter()
    expected = [layer.base.matrix().clone() for layer in layers(model)]
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    model.train().merge_adapter()
    assert all(torch.equal(layer.base.matrix(), weight) for layer, weight in zip(layers(model), expected, strict=True))


# Batches of several adapters ------------------------------------------------------------------------------------


def test_rows_are_counted_where_all_of_them_are_the_bases() -> None:
    model = adapted(MEMBERS[0])
    with pytest.raises(ValueError, match=r"adapter_names has to have an entry for each of the 2 rows.*Found 5"):
        model(input_ids=tokens(2), adapter_names=["__base__"] * 5)


# FSDP1 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@each_member
def test_a_state_dict_under_fsdp1_is_the_adapters(member: Member, group: None) -> None:
    """FSDP1 puts its wrappers between modules, into their paths and not into a state dict's keys."""
    model = get_peft_model(stack(), member.config(target_modules=["0", "4"], bias="all"))
    move(model)
    x = torch.randn(3, 24)
    inner = FullyShardedDataParallel(model.base_model.model, use_orig_params=True, device_id=torch.device("cpu"))
    model.base_model.model = inner
    whole = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with torch.no_grad():
        expected = whole(x)
    state = get_peft_model_state_dict(whole)
    again = get_peft_model(stack(), member.config(target_modules=["0", "4"], bias="all"))
    assert get_peft_model_state_dict(again).keys() == state.keys()
    set_peft_model_state_dict(again, state)
    with torch.no_grad():
        assert torch.equal(again(x), expected)


def test_targets_that_share_a_weight_are_warned_of() -> None:
    config = fresh().config
    config.tie_word_embeddings = True
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        get_peft_model(type(fresh())(config), KaSAConfig(r=2, target_modules=["lm_head"]))


def test_the_page_of_properties_names_tests_that_exist() -> None:
    here = Path(__file__).parent
    named = re.findall(r"`(\w+)::(\w+)`", (here.parent / "docs" / "peft_properties.md").read_text())
    assert len(named) > 50
    for file, words in named:
        assert re.search(rf"^def test_\w*{words}", (here / f"test_{file}.py").read_text(), re.MULTILINE), (file, words)
