"""Every property, for every member, on every base."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from bases import BASES, FLOATS, learning, load, logits, move, stack, steps
from members import IDENTICAL, MEMBERS, Member
from peft import get_peft_model
from transformers import PreTrainedModel

from peft_kasa import SpectralLinear

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)
each_base = pytest.mark.parametrize("kind", BASES)


def spectral_layers(model: torch.nn.Module) -> list[SpectralLinear]:
    return [module for module in model.modules() if isinstance(module, SpectralLinear)]


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every base tensor's bits, 4-bit ones after unpacking, without changing anything."""
    layers = {id(layer.base_layer): layer for layer in spectral_layers(model)}
    found = {}
    for name, module in model.named_modules():
        if id(module) in layers:
            found[name.replace(".base_layer", "")] = layers[id(module)].base.matrix().clone()
    return found


@each_member
@each_base
def test_training_leaves_the_base_as_it_was(member: Member, kind: str, tiny: str) -> None:
    base = load(tiny, kind)
    expected = logits(base)
    model = get_peft_model(load(tiny, kind), member.config(dropout=0.1))
    before = weights(model)
    losses = steps(model)
    assert torch.isfinite(torch.tensor(losses)).all()
    changed = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    after = weights(model)
    assert before.keys() == after.keys()
    assert len(before) == 14
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(changed, expected)
    assert torch.equal(logits(model.unload()), expected)


@pytest.mark.parametrize("member", IDENTICAL, ids=str)
@each_base
@pytest.mark.parametrize("training", [False, True])
def test_starts_exactly_at_the_base(member: Member, kind: str, training: bool, tiny: str) -> None:
    base, model = load(tiny, kind), get_peft_model(load(tiny, kind), member.config(dropout=0.5, alpha=12))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model.train(training)(input_ids=ids).logits, base.train(training)(input_ids=ids).logits)


@each_member
@each_base
def test_every_learning_slot_gets_a_gradient_and_no_other(member: Member, kind: str, tiny: str) -> None:
    model = get_peft_model(load(tiny, kind), member.config())
    move(model)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in spectral_layers(model):
        for slot, value in layer.slots("default").items():
            assert (value.grad is not None and bool(value.grad.any())) == (slot in member.learns), (layer.name, slot)
            assert value.dtype == torch.float32


@each_member
def test_parameter_count_is_the_formula(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config(r=3, rank_pattern={"q_proj": 5}))
    expected = sum(
        member.parameters(layer.out_features, layer.in_features, 5 if "q_proj" in layer.name else 3)
        for layer in spectral_layers(model)
    )
    assert sum(parameter.numel() for parameter in learning(model)) == expected


@each_member
@pytest.mark.parametrize("kind", FLOATS)
def test_merging_gives_the_adapters_output_and_unmerging_the_bits(member: Member, kind: str, tiny: str) -> None:
    model = get_peft_model(load(tiny, kind), member.config())
    move(model)
    before, expected = weights(model), logits(model).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        again = logits(model).float()
        model.unmerge_adapter()
    bound = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 6e-2}[kind]  # the two round at other places
    assert (again - expected).norm() <= bound * expected.norm()
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    assert torch.equal(logits(model).float(), expected)
    merged = model.merge_and_unload(safe_merge=True)
    assert not spectral_layers(merged)
    assert torch.equal(logits(merged).float(), again)


@each_member
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_on_a_quantised_base_warns_and_is_undone_exactly(member: Member, kind: str, tiny: str) -> None:
    model = get_peft_model(load(tiny, kind), member.config())
    move(model, 0.02)
    expected, before = logits(model), weights(model)
    with pytest.warns(UserWarning, match="Rounding to the base's storage lost up to"):
        model.merge_adapter()
    merged = logits(model)
    assert (merged - expected).norm() <= 0.6 * expected.norm()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


@each_member
def test_merging_in_bf16_reports_what_rounding_lost(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny, "bf16"), member.config())
    move(model, 1e-4)
    if member.identity:
        with pytest.warns(UserWarning, match=r"lost up to \d.*self_attn|mlp"):
            model.merge_adapter()
    else:
        model.merge_adapter()
    worst = max(layer.merge_rounding for layer in spectral_layers(model))
    assert worst > 1e-3
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unload()


@pytest.mark.parametrize("member", IDENTICAL, ids=str)
def test_a_float64_base_is_not_rounded_by_a_merge(member: Member) -> None:
    base = stack().double()
    with torch.no_grad():
        for place in (0, 2, 4):
            base[place].weight.mul_(1 + 1e-10)  # no float32 numbers any more
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = get_peft_model(base, member.config(target_modules=["0", "2", "4"])).merge_and_unload()
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())


@each_base
def test_members_of_different_methods_share_a_base(kind: str, tiny: str) -> None:
    expected = logits(load(tiny, kind))
    model, alone = None, {}
    for member in MEMBERS:
        single = get_peft_model(load(tiny, kind), member.config())
        move(single)
        alone[member.name] = logits(single)
        if model is None:
            model = get_peft_model(load(tiny, kind), member.config(), adapter_name=f"{member.name}_adapter")
        else:
            model.add_adapter(f"{member.name}_adapter", member.config())
        model.set_adapter(f"{member.name}_adapter")
        move(model)
    assert model is not None
    for member in MEMBERS:
        model.set_adapter(f"{member.name}_adapter")
        assert torch.equal(logits(model), alone[member.name])
    for member in MEMBERS[1:]:
        model.delete_adapter(f"{member.name}_adapter")
    model.set_adapter(f"{MEMBERS[0].name}_adapter")
    assert torch.equal(logits(model), alone[MEMBERS[0].name])
    assert torch.equal(logits(model.unload()), expected)


def test_active_cuts_leave_the_base_once(tiny: str) -> None:
    kasa = next(member for member in MEMBERS if not member.identity)
    wide = get_peft_model(load(tiny), kasa.config(r=2, truncation=6))
    once = logits(wide)  # left is zero at the start: only the cut acts
    wide.add_adapter("narrow", kasa.config(r=2, truncation=3))
    wide.base_model.set_adapter(["default", "narrow"])
    assert torch.allclose(logits(wide), once, atol=1e-5)
    wide.merge_adapter()
    assert torch.allclose(logits(wide), once, atol=1e-4)
    wide.unmerge_adapter()
    wide.set_adapter("narrow")
    assert not torch.allclose(logits(wide), once, atol=1e-3)


@each_member
def test_two_active_adapters_add_their_updates(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config())
    model.add_adapter("second", IDENTICAL[0].config())
    model.base_model.set_adapter(["default", "second"])
    move(model)
    layer = spectral_layers(model)[0]
    x = torch.randn(3, layer.in_features)
    expected = layer.base_layer(x) + x @ (layer.get_delta_weight("default") + layer.get_delta_weight("second")).T
    assert torch.allclose(layer(x), expected, atol=1e-4)


@each_member
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_reading_a_quantised_base_gives_the_same_before_and_after_it_ran(member: Member, kind: str, tiny: str) -> None:
    """bitsandbytes repacks a 4-bit weight at the first evaluation on some CPUs: a late start must not see that."""
    fresh = get_peft_model(load(tiny, kind), member.config())
    ran = load(tiny, kind)
    ran = get_peft_model(ran, member.config(target_modules=["q_proj"]), adapter_name="first")
    early = weights(ran)
    logits(ran)
    steps(ran, 1)
    logits(ran)
    assert all(torch.equal(early[name], value) for name, value in weights(ran).items())
    ran.add_adapter("late", member.config(target_modules=["q_proj"]))
    for layer in spectral_layers(ran):
        twin = next(other for other in spectral_layers(fresh) if other.name == layer.name)
        for slot, value in layer.slots("late").items():
            assert torch.equal(value, twin.slots("default")[slot]), (layer.name, slot)


@each_member
def test_models_and_configs_are_copied_and_pickled(member: Member, tiny: str) -> None:
    config = member.config(dropout=0.25)
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    model = get_peft_model(load(tiny), config)
    move(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))
    move(twin, seed=2)
    assert not torch.equal(logits(twin), logits(model))


@each_member
def test_starts_depend_on_the_seed_and_the_module_only(member: Member, tiny: str) -> None:
    torch.manual_seed(1)
    one = get_peft_model(load(tiny), member.config())
    torch.manual_seed(2)
    two = get_peft_model(load(tiny), member.config(), adapter_name="other")
    other = get_peft_model(load(tiny), member.config(seed=5))
    differs = False
    for a, b, c in zip(*map(spectral_layers, (one, two, other)), strict=True):
        for slot, value in a.slots("default").items():
            assert torch.equal(value, b.slots("other")[slot])
            differs |= not torch.equal(value, c.slots("default")[slot])
    assert differs == member.random


@each_member
def test_init_weights_false_is_not_the_start(member: Member, tiny: str) -> None:
    start, other = (get_peft_model(load(tiny), member.config(init_weights=flag)) for flag in (True, False))
    assert not torch.allclose(logits(start), logits(other), atol=1e-3)


@each_member
def test_learns_a_fixed_batch(member: Member, tiny: str) -> None:
    model = get_peft_model(load(tiny), member.config(r=16))
    optimizer = torch.optim.Adam(learning(model), lr=0.02 if member.learns != ("core",) else 0.5)
    ids = torch.arange(8)[None]
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_float64_look_at_kasa_on_four_bits(tiny: str) -> None:
    """KaSA on a 4-bit base is KaSA: its cut is the bottom of the dequantised weight, and its core learns."""
    kasa = next(member for member in MEMBERS if not member.identity)
    model = get_peft_model(load(tiny, "nf4"), kasa.config())
    layer = spectral_layers(model)[0]
    u, s, v = torch.linalg.svd(layer.base.matrix().double(), full_matrices=False)
    bottom = (u[:, -4:] * s[-4:]) @ v[-4:]
    assert torch.allclose(layer.get_delta_weight("default").double(), -bottom, atol=1e-5)
    before = layer.slots("default")["core"].clone()
    steps(model)
    assert not torch.equal(before, layer.slots("default")["core"])


@each_member
@pytest.mark.parametrize("kind", ["fp32", "nf4", "int8"])
def test_a_copy_made_while_merged_is_its_own(member: Member, kind: str, tiny: str) -> None:
    model = get_peft_model(load(tiny, kind), member.config())
    move(model)
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    merged = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.unmerge_adapter()
        assert torch.equal(logits(twin), expected)
        assert torch.equal(logits(model), merged)


@each_member
def test_a_copy_holds_what_learns_once(member: Member) -> None:
    """Its masters are its own slots, as those of what was copied are."""
    model = get_peft_model(stack(), member.config(target_modules=["0", "2", "4"]))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for layer in spectral_layers(twin):
            slots, masters = layer.slots("default"), layer.adapters["default"].masters
            assert set(masters) == layer.learnt("default")
            assert all(slots[name].data_ptr() == value.data_ptr() for name, value in masters.items())


@each_member
def test_compiles_to_one_graph(member: Member, tiny: str) -> None:
    layer = spectral_layers(get_peft_model(load(tiny), member.config()))[0]
    x = torch.randn(3, layer.in_features)
    assert torch._dynamo.explain(layer)(x).graph_count == 1


def test_a_safe_merge_of_a_broken_adapter_changes_nothing(tiny: str) -> None:
    model = get_peft_model(load(tiny), IDENTICAL[0].config())
    expected = logits(model)
    broken = spectral_layers(model)[7].slots("default")["left"]
    with torch.no_grad():
        broken[0, 0] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="left of adapter 'default' has NaN"):
            merge(safe_merge=True)
    assert not any(layer.merged for layer in spectral_layers(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["left", "cut_right", "fingerprint", "a.b", "keys", "peft_kasa_learnt"])
def test_names_that_would_lose_tensors_are_refused(name: str, tiny: str) -> None:
    model = get_peft_model(load(tiny), IDENTICAL[0].config())
    with pytest.raises(ValueError, match="An adapter's name may not be"):
        model.add_adapter(name, IDENTICAL[0].config())
    with pytest.raises(ValueError, match="An adapter's name may not be"):
        get_peft_model(load(tiny), IDENTICAL[0].config(), adapter_name=name)


def test_layers_on_which_an_adapter_would_have_no_effect_are_refused() -> None:
    attention = torch.nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(TypeError, match=r"self_attn\.out_proj: nn\.MultiheadAttention reads this weight"):
        get_peft_model(attention, IDENTICAL[0].config(r=2, target_modules=["out_proj"]))
    normed = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="0: its weight is a parametrization"):
        get_peft_model(normed, IDENTICAL[0].config(r=2, target_modules=["0"]))


def test_a_lazy_start_gives_values_to_whoever_asks_first(tiny: str) -> None:
    from peft import get_peft_config

    for member in MEMBERS:
        config = get_peft_config(member.config().to_dict())
        config.statistics = member.config().statistics
        model = get_peft_model(load(tiny), config)
        assert torch.isfinite(spectral_layers(model)[0].get_delta_weight("default")).all()
