"""Ranks by module: chosen as EVA's paper and PEFT choose them, for any member, and kept by the file."""

from __future__ import annotations

import copy
import json
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from bases import load, logits, move, stack
from members import MEMBERS, Member
from peft import EvaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict
from reference import eva as paper
from torch import nn

from peft_kasa import EVAConfig, PiSSAConfig, SpectralLinear, SVFConfig, SVFTConfig, calibrate, export_lora
from peft_kasa.adapter.budget import allocate

NAMES = ["0", "2", "4"]  # of the stack: 12 x 24, 20 x 12 and 20 x 20
PISSA = next(member for member in MEMBERS if member.name == "pissa")
each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)


def layers_of(model: nn.Module) -> list[SpectralLinear]:
    return [module for module in model.modules() if isinstance(module, SpectralLinear)]


def ranks(model: nn.Module, adapter: str = "default") -> dict[str, int]:
    """Of the modules that have the adapter, by the tensors that they hold."""
    found = {}
    for layer in layers_of(model):
        if adapter in layer.adapters:
            found[layer.name] = layer.adapters[adapter].rank
            assert layer.value(adapter).right.shape[0] == found[layer.name]
    return found


def budgeted(member: Member, base: nn.Module | None = None, **given: Any) -> PeftModel:
    base = stack() if base is None else base
    given = {"target_modules": NAMES if isinstance(base, nn.Sequential) else "all-linear", "r": 4} | given
    return get_peft_model(base, member.config(**({"rank_budget": "variance"} | given)))


def shares_of(weight: torch.Tensor) -> list[float]:
    squares = torch.linalg.svdvals(weight.detach().double()).square()
    return (squares / squares.sum()).tolist()


def flat(modules: int = 3, peaked: tuple[int, ...] = (0,), size: int = 16) -> nn.Sequential:
    """Square layers all of whose singular values are 1, but for the peaked ones: theirs fall by halves."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(modules)))
    for index, layer in enumerate(model):
        u, v = (torch.linalg.qr(torch.randn(size, size))[0] for _ in range(2))
        s = 0.5 ** torch.arange(size) if index in peaked else 1 - 0.001 * (index + 1) * torch.arange(size)
        with torch.no_grad():
            layer.weight.copy_(u * s @ v)
    return model


# Against EVA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 3, 4])
@pytest.mark.parametrize("spread", [1.0, 1.5, 2.0, 9.0])
@pytest.mark.parametrize("of", ["llama", "stack"])
def test_variance_is_evas_redistribution(r: int, spread: float, of: str, tiny: str) -> None:
    base = load(tiny) if of == "llama" else stack()
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"] if of == "llama" else NAMES  # without ties
    model = get_peft_model(
        base,
        EVAConfig(r=r, rank_spread=spread, target_modules=targets, statistics=(seen := bases.statistics("inputs"))),
    )
    shapes = {name: module.weight.shape for name, module in base.named_modules() if name in seen.names}
    names = [name for name in shapes if name.rpartition(".")[2] in targets]
    ratios = {
        name: paper.explained(seen.evidence(name).matrix(centred=True).double(), min(int(spread * r), *shapes[name]))
        for name in names
    }
    expected = paper.redistribute(ratios, r * len(names))
    assert sum(expected.values()) == r * len(names)
    assert ranks(model) == {name: rank for name, rank in expected.items() if rank}
    assert model.peft_config["default"].rank_pattern == ranks(model)
    if int(spread * r) > r:
        assert len(set(expected.values())) > 1


@pytest.mark.parametrize(("r", "rho"), [(4, 2.0), (2, 2.0), (3, 1.0), (4, 1.5)])
def test_variance_is_pefts_own_eva(r: int, rho: float, tiny: str) -> None:
    """Of one batch, which PEFT's incremental decomposition sees twice."""
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]  # whose inputs differ: PEFT leaves the order of ties open
    ids = bases.tokens(4, 16, seed=3)
    eva = EvaConfig(rho=rho, use_label_mask=False)
    lora = LoraConfig(r=r, target_modules=targets, init_lora_weights="eva", eva_config=eva)
    theirs = get_eva_state_dict(load(tiny), [{"input_ids": ids}], lora, show_progress_bar=False)
    ours = get_peft_model(load(tiny), EVAConfig(r=r, rank_spread=rho, target_modules=targets))
    calibrate(ours, [{"input_ids": ids}])
    assert ranks(ours) == {name: len(axes) for name, axes in theirs.items() if len(axes)}


def test_evas_scale_is_that_of_the_configs_r(tmp_path: Path) -> None:
    config = EVAConfig(r=4, alpha=6.0, target_modules=NAMES, statistics=bases.statistics("inputs"))
    model = get_peft_model(stack(), config)
    assert len(set(ranks(model).values())) > 1
    assert {layer.adapters["default"].scale for layer in layers_of(model)} == {1.5}
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(stack(), str(tmp_path))
    assert {layer.adapters["default"].scale for layer in layers_of(again)} == {1.5}
    other = get_peft_model(stack(), PiSSAConfig(r=4, alpha=6.0, rank_budget="variance", target_modules=NAMES))
    for layer in layers_of(other):  # as with a rank_pattern
        assert layer.adapters["default"].scale == 6.0 / layer.adapters["default"].rank


# The rule ---------------------------------------------------------------------------------------------------------


def test_variance_of_weights_is_of_their_squared_singular_values(tiny: str) -> None:
    for base, r, spread in ((stack(), 3, 2.0), (stack(), 5, 1.5), (load(tiny), 4, 2.0)):
        targets = NAMES if isinstance(base, nn.Sequential) else ["q_proj", "k_proj", "down_proj"]
        weights = {n: m.weight for n, m in base.named_modules() if n and n.rpartition(".")[2] in targets}
        most = int(r * spread)
        expected = paper.redistribute(
            {name: shares_of(weight)[:most] for name, weight in weights.items()}, r * len(weights)
        )
        model = get_peft_model(
            base, PiSSAConfig(r=r, rank_budget="variance", rank_spread=spread, target_modules=targets)
        )
        assert ranks(model) == {name: rank for name, rank in expected.items() if rank}


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_share_is_the_smallest_rank_that_holds_it(threshold: float) -> None:
    weights = {name: module.weight for name, module in stack().named_children() if name in NAMES}
    model = budgeted(PISSA, rank_budget=threshold, rank_spread=9.0, r=8)
    for name, rank in ranks(model).items():
        shares = shares_of(weights[name])
        assert sum(shares[:rank]) >= threshold - 1e-6 or rank == len(shares)
        assert sum(shares[: rank - 1]) < threshold
    assert ranks(model).keys() == set(NAMES)  # each has at least one


def test_a_share_is_capped_by_the_spread() -> None:
    assert set(ranks(budgeted(PISSA, rank_budget=0.999, r=4)).values()) == {8}
    assert set(ranks(budgeted(PISSA, rank_budget=0.999, r=4, rank_spread=1.0)).values()) == {4}
    assert set(ranks(budgeted(PISSA, rank_budget=0.999, r=3, rank_spread=1.5)).values()) == {4}
    assert ranks(budgeted(PISSA, rank_budget=0.999999, r=12, rank_spread=9.0)) == {"0": 12, "2": 12, "4": 20}


def test_a_dictionary_is_a_rank_pattern() -> None:
    model = budgeted(PISSA, rank_budget={"0": 2, "4": 7}, rank_pattern={"2": 5})
    assert ranks(model) == {"0": 2, "2": 5, "4": 7}
    assert model.peft_config["default"].rank_budget is None
    assert model.peft_config["default"].rank_pattern == {"0": 2, "2": 5, "4": 7}
    assert ranks(budgeted(PISSA, rank_budget={"0": 2}, rank_pattern={"0": 5})) == {"0": 2, "2": 4, "4": 4}


@pytest.mark.parametrize("spread", [1.0, 1.3, 2.0])
def test_no_rank_is_above_the_spread(spread: float) -> None:
    model = get_peft_model(
        flat(), PiSSAConfig(r=4, rank_budget="variance", rank_spread=spread, target_modules=["0", "1", "2"])
    )
    assert max(ranks(model).values()) == {1.0: 4, 1.3: 5, 2.0: 6}[spread]
    assert sum(ranks(model).values()) == 12


def test_allocate_gives_ties_to_whom_comes_first_and_no_more_than_there_is() -> None:
    tied = {"a": torch.full((3,), 0.2), "b": torch.full((3,), 0.2), "c": torch.full((3,), 0.1)}
    assert allocate(tied, "variance", 1) == {"a": 3, "b": 0, "c": 0}
    assert allocate(tied, "variance", 2) == {"a": 3, "b": 3, "c": 0}
    assert allocate(tied, "variance", 9) == {"a": 3, "b": 3, "c": 3}
    assert allocate(tied, 0.4, 1) == {"a": 2, "b": 2, "c": 3}  # float32's 0.2 is a little above it
    many = {str(index): torch.full((7,), 0.1) for index in range(300)}
    assert allocate(many, "variance", 1) == {str(index): min(7, max(0, 300 - 7 * index)) for index in range(300)}
    assert allocate(dict(reversed(tied.items())), "variance", 1) == {"c": 0, "b": 3, "a": 0}


# Modules without a rank -------------------------------------------------------------------------------------------


def test_modules_without_a_rank_are_unwrapped_and_no_target(tmp_path: Path) -> None:
    base = flat(4, peaked=(0, 2))
    model = get_peft_model(base, PiSSAConfig(r=1, rank_budget="variance", target_modules=["0", "1", "2", "3"]))
    assert ranks(model) == {"0": 2, "2": 2}
    assert [type(module) for module in base] == [SpectralLinear, nn.Linear, SpectralLinear, nn.Linear]
    assert model.peft_config["default"].target_modules == {"0", "2"}
    assert {layer.adapters["default"].peers for layer in layers_of(model)} == {2}
    move(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(flat(4, peaked=(0, 2)), str(tmp_path / "adapter"))
    x = torch.randn(3, 16)
    assert torch.equal(again(x), model(x))
    report = export_lora(model, tmp_path / "lora")
    assert report.errors.keys() == {"0", "2"}
    lora = PeftModel.from_pretrained(flat(4, peaked=(0, 2)), str(tmp_path / "lora"))
    assert torch.allclose(lora(x), model(x), atol=1e-5)
    assert torch.equal(model.unload()(x), flat(4, peaked=(0, 2))(x))


def nested() -> nn.Sequential:
    """Names that end in other names: a, x.a, x.b, y.x.a and y.x.b."""
    a, *rest = flat(5, peaked=(0, 2, 3))
    inner, outer = (nn.Sequential(OrderedDict(a=rest[i], b=rest[i + 1])) for i in (0, 2))
    return nn.Sequential(OrderedDict(a=a, x=inner, y=nn.Sequential(OrderedDict(x=outer))))


@pytest.mark.parametrize("r", [1, 2, 4])
def test_names_that_end_in_other_names_keep_their_own_ranks(r: int, tmp_path: Path) -> None:
    weights = {name: module.weight for name, module in nested().named_modules() if isinstance(module, nn.Linear)}
    expected = paper.redistribute({name: shares_of(w)[: 2 * r] for name, w in weights.items()}, 5 * r)
    model = get_peft_model(nested(), PiSSAConfig(r=r, rank_budget="variance", target_modules=["a", "b"]))
    assert ranks(model) == {name: rank for name, rank in expected.items() if rank}
    assert r > 1 or expected["x.a"] == 0 < expected["a"]
    assert len(set(expected.values())) > 1
    move(model)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(nested(), str(tmp_path))
    assert ranks(again) == ranks(model)
    x = torch.randn(3, 16)
    assert torch.equal(again(x), model(x))


def test_what_rank_pattern_names_takes_no_part() -> None:
    base = flat(4, peaked=(0, 2))
    config = PiSSAConfig(
        r=2, rank_budget="variance", rank_pattern={"0": 1, "[13]": 3}, target_modules=["0", "1", "2", "3"]
    )
    model = get_peft_model(base, config)
    assert ranks(model) == {"0": 1, "1": 3, "2": 2, "3": 3}
    assert config.rank_pattern == {"0": 1, "[13]": 3, "2": 2}


# Any member, any adapter ------------------------------------------------------------------------------------------


@each_member
def test_every_member_takes_a_budget(member: Member, tiny: str, tmp_path: Path) -> None:
    model = budgeted(member, load(tiny), r=3, alpha=6.0, target_modules=["q_proj", "k_proj", "down_proj"])
    assert sum(ranks(model).values()) == 3 * 6
    assert len(set(ranks(model).values())) > 1
    move(model)
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["rank_pattern"] == ranks(model)
    assert written["rank_budget"] == "variance"
    again = PeftModel.from_pretrained(load(tiny), str(tmp_path))
    assert ranks(again) == ranks(model)
    assert torch.equal(logits(again), expected)
    chosen = ranks(model)
    plain = get_peft_model(load(tiny), member.config(r=3, rank_pattern=chosen, target_modules=list(chosen)))
    fresh = budgeted(member, load(tiny), r=3, target_modules=["q_proj", "k_proj", "down_proj"])
    for one, other in zip(layers_of(plain), layers_of(fresh), strict=True):
        assert all(torch.equal(value, other.slots("default")[slot]) for slot, value in one.slots("default").items())


@each_member
def test_a_second_adapter_with_a_budget_stays_inactive(member: Member) -> None:
    model = get_peft_model(stack(), PISSA.config(r=2, target_modules=NAMES))
    move(model)
    x = torch.randn(3, 24)
    expected = model(x).detach()
    model.add_adapter("second", member.config(r=4, rank_budget="variance", target_modules=NAMES))
    assert torch.equal(model(x), expected)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning
    assert not any(".second." in name for name in learning)
    assert sum(ranks(model, "second").values()) == 12
    assert ranks(model) == {"0": 2, "2": 2, "4": 2}
    model.set_adapter("second")
    learning = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == set(member.learns)
    model.delete_adapter("second")
    assert torch.equal(model(x), expected)


def test_a_second_adapter_leaves_modules_to_the_first() -> None:
    base = flat(4, peaked=(0,))
    model = get_peft_model(base, PiSSAConfig(r=2, target_modules=["0", "1"]))
    config = PiSSAConfig(r=1, rank_budget="variance", target_modules=["0", "1", "2", "3"])
    model.add_adapter("second", config)
    assert ranks(model, "second") == {"0": 2, "3": 2}
    assert ranks(model) == {"0": 2, "1": 2}
    assert type(base[2]) is nn.Linear
    assert config.target_modules == {"0", "3"}


# Once ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often shares were computed, by method."""
    count: Counter[str] = Counter()
    for config_class in (PiSSAConfig, EVAConfig):
        measured = config_class.shares

        def shares(self: Any, *given: Any, measured: Any = measured) -> Any:
            count[self.name] += 1
            return measured(self, *given)

        monkeypatch.setattr(config_class, "shares", shares)
    return count


def test_loading_spends_nothing(spent: Counter[str], tmp_path: Path) -> None:
    model = get_peft_model(flat(4), PiSSAConfig(r=1, rank_budget="variance", target_modules=["0", "1", "2", "3"]))
    assert spent == {"pissa": 4}
    model.save_pretrained(str(tmp_path))
    for low in (False, True):
        again = PeftModel.from_pretrained(flat(4), str(tmp_path), low_cpu_mem_usage=low, is_trainable=True)
        assert ranks(again) == ranks(model)
    again.load_adapter(str(tmp_path), "other")
    assert ranks(again, "other") == ranks(model)
    assert spent == {"pissa": 4}


@each_member
def test_a_copy_beside_it_has_the_same_ranks(member: Member, tmp_path: Path) -> None:
    """As TRL's DPO makes its reference: a second adapter with the first one's config, then a copy by name."""
    base = flat(4) if not member.config_class.needs else stack()  # of the flat one, two ranks would leave one module
    targets = ["0", "1", "2", "3"] if not member.config_class.needs else NAMES
    model = get_peft_model(base, member.config(r=1, rank_budget="variance", target_modules=targets, rank_spread=3.0))
    move(model)
    first = ranks(model)
    x = torch.randn(3, 16 if len(targets) == 4 else 24)
    expected = model(x).detach()
    assert len(first) < len(targets) or member.config_class.needs
    model.add_adapter("ref", model.peft_config["default"])
    assert ranks(model, "ref") == ranks(model) == first
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(model(x), expected)
    model.save_pretrained(str(tmp_path))  # and once more, from the file
    again = PeftModel.from_pretrained(model.unload(), str(tmp_path / "ref"), is_trainable=True)
    again.add_adapter("third", copy.deepcopy(again.peft_config["default"])) if not member.config_class.needs else None
    assert ranks(again) == first
    assert member.config_class.needs or ranks(again, "third") == first


def test_a_config_from_a_file_without_ranks_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """Its values are to come from a file. If none follows, they would all be of rank r, unasked."""
    PiSSAConfig(r=2, rank_budget="variance", target_modules=["0", "1", "2"]).save_pretrained(str(tmp_path))
    config = PeftConfig.from_pretrained(str(tmp_path))
    config.inference_mode = False
    fresh = replace(config)
    model = get_peft_model(flat(), config)
    with pytest.raises(ValueError, match=r"0: the rank of adapter 'default' has not been chosen .*replace\(config\)"):
        model(torch.randn(3, 16))
    assert ranks(get_peft_model(flat(), fresh))["0"] == 2
    assert sum(fresh.rank_pattern.values()) == 6


def test_statistics_that_come_later_spend_once(spent: Counter[str], tmp_path: Path) -> None:
    inputs = torch.randn(16, 1, 8, 24, generator=torch.Generator().manual_seed(9))
    model = get_peft_model(bases.Scored(*stack()), EVAConfig(r=4, target_modules=NAMES))
    assert not spent
    calibrate(model, [{"input": x} for x in inputs])
    assert spent == {"eva": 3}
    direct = get_peft_model(stack(), EVAConfig(r=4, target_modules=NAMES, statistics=bases.statistics("inputs")))
    assert ranks(model) == ranks(direct)
    assert sum(ranks(model).values()) == 12
    assert all(layer.peft_kasa_learnt["default"].left.requires_grad for layer in layers_of(model))


# Errors -----------------------------------------------------------------------------------------------------------


def bad_budgets() -> Iterator[tuple[Any, str]]:
    rule = "rank_budget has to be None, 'variance', a share between 0 and 1, or ranks by module name"
    yield from (({"rank_budget": budget}, rule) for budget in ("energy", 0.0, 1.0, 1.5, -0.5, 3, True, float("nan")))
    yield {"rank_budget": "variance", "rank_spread": 0.5}, r"rank_spread has to be at least 1\. Found 0\.5"
    yield {"rank_budget": "variance", "rank_spread": float("nan")}, "rank_spread has to be at least 1"
    yield {"rank_budget": "variance", "r": None}, r"rank_budget='variance' needs r, the mean rank\. Found None"
    yield {"rank_budget": {"0": 0}}, "r has to be a whole number of at least 1. Found 0"
    yield {"rank_budget": {"0": 2.5}}, "r has to be a whole number"


@pytest.mark.parametrize(("given", "said"), bad_budgets(), ids=str)
def test_what_is_not_a_budget_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PiSSAConfig(**given)


def test_all_triples_have_no_mean_rank() -> None:
    for config_class in (SVFConfig, SVFTConfig):
        with pytest.raises(ValueError, match="needs r, the mean rank"):
            config_class(rank_budget="variance")
        model = get_peft_model(stack(), config_class(rank_budget=0.8, target_modules=NAMES))
        weights = {name: module.weight for name, module in stack().named_children() if name in NAMES}
        assert all(sum(shares_of(weights[name])[: rank - 1]) < 0.8 for name, rank in ranks(model).items())
        assert max(ranks(model).values()) < 12


def test_a_rank_that_does_not_fit_is_refused() -> None:
    base = stack()
    with pytest.raises(ValueError, match=r"0: r has to be at most min\(out, in\) = min\(12, 24\).*Found 13"):
        get_peft_model(base, PiSSAConfig(rank_budget={"0": 13}, target_modules=NAMES))
    assert not layers_of(base)


def test_an_error_while_choosing_leaves_the_model_without_the_adapter() -> None:
    base = stack()
    with torch.no_grad():
        base[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="2: "):
        get_peft_model(base, PiSSAConfig(r=2, rank_budget="variance", target_modules=NAMES))
    assert not layers_of(base)


def test_ranks_are_not_chosen_where_the_weights_are_not() -> None:
    base = stack().to("meta")
    with pytest.raises(ValueError, match="0: rank_budget needs the base weights, which are on the meta device"):
        get_peft_model(base, PiSSAConfig(r=2, target_modules=NAMES, rank_budget="variance"))
    assert not layers_of(base)
    chosen = dict.fromkeys(NAMES, 2)
    get_peft_model(base, PiSSAConfig(r=2, target_modules=NAMES, rank_budget="variance", rank_pattern=chosen))
