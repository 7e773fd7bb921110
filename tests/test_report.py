"""Reports of weights and of saved adapters: their numbers against dense float64 definitions, and what they refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from members import MEMBERS, VARIANTS, Member
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_kasa import KaSAConfig, PiSSAConfig, SpectralLinear, SVFConfig, export_lora
from peft_kasa.report import AdapterReport, inspect, spectrum
from peft_kasa.report.measures import effective_rank, rank_for, singular_values, stable_rank, tail_energy
from peft_kasa.report.naming import places
from peft_kasa.report.updates import COSINES, beside, decomposed
from peft_kasa.spectral.lowrank import from_factors

TARGETS = ["0", "2", "4"]
RELATIVE = 1e-6


def saved(folder: Path, config: Any = None) -> tuple[str, dict[str, Tensor]]:
    """An adapter of the stack that has moved, saved; and its updates, dense in float64."""
    model = get_peft_model(bases.stack(), config or KaSAConfig(r=4, target_modules=TARGETS))
    bases.move(model)
    model.save_pretrained(str(folder))
    return str(folder), updates(model)


def updates(model: nn.Module) -> dict[str, Tensor]:
    """What each module's adapter adds, dense."""
    layers = [module for module in model.modules() if isinstance(module, SpectralLinear)]
    return {layer.name: layer.lowrank("default").dense().detach().double() for layer in layers}


# Spectra of weights -----------------------------------------------------------------------------------------------


def test_numbers_of_weights_are_those_of_their_definitions() -> None:
    model = bases.fresh()
    rows = {row["module"]: row for row in spectrum(model, ranks=[2, 8]).rows()}
    modules = dict(model.named_modules())
    assert len(rows) == 14
    for name, row in rows.items():
        weight = modules[name].weight.detach().double()
        s = torch.linalg.svdvals(weight)
        p = s / s.sum()
        expected = {
            "rows": weight.shape[0],
            "columns": weight.shape[1],
            "norm": weight.norm(),
            "largest": s[0],
            "smallest": s[-1],
            "effective_rank": (-(p * p.log()).sum()).exp(),
            "stable_rank": s.square().sum() / s[0].square(),
            "energy_r2": s[:2].square().sum() / s.square().sum(),
            "cut_value_r8": s[-8],
            "cut_energy_r8": s[-8:].square().sum() / s.square().sum(),
            "rank_90": next(k for k in range(1, 65) if s[:k].square().sum() >= 0.9 * s.square().sum()),
        }
        assert {key: row[key] for key in expected} == pytest.approx(
            {k: float(v) for k, v in expected.items()}, RELATIVE
        )


def test_the_cut_is_what_kasa_takes_out() -> None:
    report = spectrum(bases.fresh(), ranks=[4])
    for reference in (False, True):
        config = KaSAConfig(r=4, target_modules="all-linear", reference_truncation=reference)
        model = get_peft_model(bases.fresh(), config)
        layers = {m.name: m for m in model.modules() if isinstance(m, SpectralLinear)}
        for row in report.rows():
            slots = layers[row["module"]].slots("default")
            cut = slots.get("cut_left")
            count = 0 if cut is None else cut.shape[1]
            assert count == (row["reference_cut_r4"] if reference else 4)
            if not reference:
                taken = cut.double() @ slots["cut_right"].double()
                assert torch.linalg.matrix_norm(taken, 2).item() == pytest.approx(row["cut_value_r4"], 1e-4)
                share = (taken.norm() / row["norm"]).square().item()
                assert share == pytest.approx(row["cut_energy_r4"], 1e-3)


def test_ranks_by_budget_are_those_that_a_config_gives() -> None:
    given = {row["module"]: row["budget_r4"] for row in spectrum(bases.fresh(), ranks=[4]).rows()}
    model = get_peft_model(bases.fresh(), PiSSAConfig(r=4, target_modules="all-linear", rank_budget="variance"))
    layers = {m.name: m.adapters["default"].rank for m in model.modules() if isinstance(m, SpectralLinear)}
    assert layers == {name: rank for name, rank in given.items() if rank}


@pytest.mark.parametrize("kind", bases.BASES)
def test_any_storage_is_read_and_left_as_it_is(tiny: str, kind: str) -> None:
    model = bases.load(tiny, kind)
    before = bases.logits(model)
    rows = spectrum(model, ranks=[4]).rows()
    exact = {row["module"]: row["norm"] for row in spectrum(bases.load(tiny), ranks=[4]).rows()}
    assert {row["module"]: row["norm"] for row in rows} == pytest.approx(exact, 0.05)
    assert torch.equal(bases.logits(model), before)
    assert not any(isinstance(module, SpectralLinear) for module in model.modules())


def test_adapters_on_the_model_do_not_count() -> None:
    rows = spectrum(bases.fresh(), ranks=[4]).rows()
    model = get_peft_model(bases.fresh(), KaSAConfig(r=4, target_modules="all-linear"))
    assert spectrum(model, ranks=[4]).rows() == rows
    model.merge_adapter()
    assert spectrum(model, ranks=[4]).rows() == rows
    assert model.get_model_status().merged_adapters == ["default"]


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (6, 6), (9, 4)])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e20])
def test_degenerate_weights_have_numbers(shape: tuple[int, int], scale: float) -> None:
    model = nn.Sequential(nn.Linear(*reversed(shape)))
    model[0].weight.data = scale * torch.ones(shape)
    row = spectrum(model, ranks=[1, 8]).rows()[0]
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    assert row["norm"] == pytest.approx(scale * math.sqrt(shape[0] * shape[1]), RELATIVE)
    assert row["effective_rank"] == pytest.approx(1.0 if scale else 0.0, abs=1e-5)
    assert row["cut_value_r8"] is None  # KaSA would leave nothing
    assert row["rank_50"] == (1 if scale else 0)


def test_small_values_are_right_to_1e_8_of_the_largest() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 40, generator=generator, dtype=torch.float64)).Q for n in (60, 40))
    s = torch.logspace(0, -12, 40, dtype=torch.float64)
    found = singular_values(u * s @ v.T)
    assert (found - s).abs().max() < 2e-8
    assert ((found - s).abs() / s)[s > 1e-3].max() < 1e-10


def test_measures_of_nothing_and_of_equals() -> None:
    equal, empty = torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    assert (effective_rank(equal), stable_rank(equal)) == (pytest.approx(7), pytest.approx(7))
    assert (rank_for(equal, 0.5), rank_for(equal, 1.0), tail_energy(equal, 9)) == (4, 7, pytest.approx(1))
    assert (effective_rank(empty), stable_rank(empty), rank_for(empty, 0.5), tail_energy(empty, 2)) == (0, 0, 0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    model = bases.stack()
    model[2].weight.data[1, 1] = bad
    with pytest.raises(ValueError, match=r"^2: the weight has to be finite.*1 entries"):
        spectrum(model, ranks=[4])


def test_bad_questions_are_refused() -> None:
    for ranks in ([], [0], [2.5], [True]):
        with pytest.raises(ValueError, match="ranks has to be whole numbers of at least 1"):
            spectrum(bases.stack(), ranks=ranks)
    with pytest.raises(ValueError, match="Found none for"):
        spectrum(bases.stack(), target_modules=["7"])
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"^0: the weight has to be loaded"):
        spectrum(model)


def test_places_tell_modules_apart() -> None:
    names = [
        f"{side}.block.{i}.{part}" for side in ("encoder", "decoder") for i in (0, 1) for part in ("att.q", "mlp.q")
    ]
    found = places(names)
    assert len(set(found.values())) == len(names)
    assert found["decoder.block.1.mlp.q"].depth == 1
    experts = places([f"layers.{i}.experts.{j}.up" for i in (0, 1) for j in (0, 1)])
    assert set(experts.values()) == {("up", 0), ("up", 1)}


# Adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", [*MEMBERS, *VARIANTS], ids=str)
def test_updates_are_those_of_the_loaded_adapter(member: Member, tmp_path: Path) -> None:
    folder, dense = saved(tmp_path, member.config(target_modules=TARGETS))
    alone, beside = inspect(folder), inspect(folder, bases.stack())
    assert alone.facts["method"] == member.name
    shapes = {"0": (12, 24), "2": (20, 12), "4": (20, 20)}
    assert alone.facts["trained"] == sum(member.parameters(*shape, 4) for shape in shapes.values())
    for module, other in zip(alone.modules, beside.modules, strict=True):
        s = torch.linalg.svdvals(dense[module.name])
        assert other.values is not None
        assert other.values.tolist() == pytest.approx(s[: len(other.values)].tolist(), rel=1e-4, abs=1e-5 * s[0].item())
        assert s[len(other.values) :].norm() <= 1e-5 * s[0]
        if module.values is not None:
            assert module.values.tolist() == pytest.approx(other.values.tolist(), rel=1e-5, abs=1e-6 * s[0].item())
        assert module.trained == member.parameters(*shapes[module.name], 4)
    needs_base = beside.modules[0].values is not None and alone.modules[0].values is None
    assert needs_base == (member.name in ("svf", "svft"))


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_numbers_beside_the_base_are_those_of_their_definitions(member: Member, tmp_path: Path) -> None:
    folder, dense = saved(tmp_path, member.config(target_modules=TARGETS))
    base = bases.stack()
    rows = {row["module"]: row for row in inspect(folder, base).rows()}
    for name, update in dense.items():
        weight = base.get_submodule(name).weight.detach().double()
        u, s, vt = torch.linalg.svd(weight)
        uu, ss, vvt = torch.linalg.svd(update)
        rank, row = int((ss > 1e-6 * ss[0]).sum()), rows[name]
        assert row["update_rank"] == rank
        ends = {"top": slice(0, 4), "bottom": slice(len(s) - 4, len(s))}
        expected = {"relative_norm": (update.norm() / weight.norm()).item()}
        for end, part in ends.items():
            expected[f"overlap_{end}_left"] = squared_cosines(uu[:, :rank], u[:, part])
            expected[f"overlap_{end}_right"] = squared_cosines(vvt[:rank].T, vt[part].T)
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-3)
        tuned = torch.linalg.svd(weight + update).U[:, :10]
        nearest = (tuned.T @ u[:, : len(s)]).abs().amax(1)
        for cosine in COSINES:
            if (nearest - cosine).abs().min() > 1e-3:
                assert row[f"intruders_{cosine}"] == int((nearest < cosine).sum())


def squared_cosines(one: Tensor, other: Tensor) -> float:
    return torch.linalg.svdvals(one.T @ other).square().mean().item()


def test_an_intruder_is_seen() -> None:
    """A strong direction between two of W's is like neither; one along W's own is no intruder."""
    weight = torch.diag(torch.linspace(2, 1, 12))
    between = torch.zeros(12, 1)
    between[:4] = 0.5
    strange = beside(decomposed(from_factors(9 * between, between.T)), weight, 1, "strange")
    assert strange.intruders[0.6] >= 1
    own = torch.eye(12, 1)
    assert set(beside(decomposed(from_factors(9 * own, own.T)), weight, 1, "own").intruders.values()) == {0}


def test_two_adapters_are_compared(tmp_path: Path) -> None:
    one, first = saved(tmp_path / "one")
    other, second = saved(tmp_path / "other", PiSSAConfig(r=2, target_modules=["2", "4"]))
    report = inspect(one, against=other)
    rows = {row["module"]: row for row in report.rows()}
    assert report.only == ["0"]
    assert rows["0"]["cosine"] is None
    for name in ("2", "4"):
        a, b = first[name], second[name]
        expected = {
            "cosine": ((a * b).sum() / a.norm() / b.norm()).item(),
            "distance": (a - b).norm().item(),
            "relative_distance": ((a - b).norm() / a.norm()).item(),
        }
        assert {key: rows[name][key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert "in one of the two alone: 0" in report.summary()


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_an_export_is_its_adapter(member: Member, tmp_path: Path) -> None:
    """Plain LoRAs are read too, and found to be the same update."""
    model = get_peft_model(bases.stack(), member.config(target_modules=TARGETS))
    bases.move(model)
    model.save_pretrained(str(tmp_path / "native"))
    export_lora(model, tmp_path / "lora")
    report = inspect(tmp_path / "lora", bases.stack(), against=tmp_path / "native")
    assert report.facts["method"] == "lora"
    assert max(row["relative_distance"] for row in report.rows()) < 1e-5


def test_loras_of_peft_have_their_scale(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS, rank_pattern={"2": 2}, alpha_pattern={"4": 3}
    )
    model = get_peft_model(bases.stack(), config)
    bases.move(model)
    model.save_pretrained(str(tmp_path))
    layers = {name: model.base_model.model.get_submodule(name) for name in TARGETS}
    for row in inspect(tmp_path).rows():
        dense = layers[row["module"]].get_delta_weight("default").double()
        assert row["norm"] == pytest.approx(dense.norm().item(), 1e-5)


@pytest.mark.parametrize("given", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_loras_that_are_more_than_a_product_are_refused(given: dict[str, Any], tmp_path: Path) -> None:
    get_peft_model(bases.stack(), LoraConfig(r=2, target_modules=TARGETS, **given)).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"plain LoRA|leaves the base"):
        inspect(tmp_path)


def test_an_adapter_that_does_nothing_has_numbers(tmp_path: Path) -> None:
    get_peft_model(bases.stack(), PiSSAConfig(r=2, target_modules=TARGETS)).save_pretrained(str(tmp_path))
    report = inspect(tmp_path, bases.stack(), against=tmp_path)
    for row in report.rows():
        assert (row["update_rank"], row["norm"], row["relative_norm"], row["intruders_0.5"]) == (0, 0.0, 0.0, 0)
        assert row["cosine"] is None
    assert report.summary()


def test_what_needs_the_base_says_so(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, SVFConfig(target_modules=TARGETS))
    report = inspect(folder)
    assert all(row["norm"] is None for row in report.rows())
    assert "3 updates follow from the base weights: pass base= to see them" in report.summary()


def test_no_adapter_is_found_by_what_is_wrong_with_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere has to be the folder of a saved adapter.*snapshot_download"):
        inspect(tmp_path / "nowhere")
    folder, _ = saved(tmp_path / "one")
    config, weights = tmp_path / "one" / "adapter_config.json", tmp_path / "one" / "adapter_model.safetensors"
    held, tensors = config.read_text(), load_file(weights)
    config.write_text(json.dumps(json.loads(held) | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match=r"peft_type has to be PEFT_KASA or LORA.*'IA3'"):
        inspect(folder)
    config.write_text(held[:40])
    with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
        inspect(folder)
    config.write_text(held)
    key = "base_model.model.2.peft_kasa_learnt.left"
    save_file(tensors | {key: torch.full_like(tensors[key], math.nan)}, weights)
    with pytest.raises(ValueError, match=r"2\.peft_kasa_learnt\.left has to be finite.*80 NaN"):
        inspect(folder)
    weights.write_bytes(b"short")
    with pytest.raises(ValueError, match="is damaged or was cut short"):
        inspect(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has to hold adapter_model\.safetensors"):
        inspect(folder)


def test_a_base_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    narrow, short, other = bases.stack(), bases.stack()[:3], bases.stack()
    narrow[2] = nn.Linear(12, 8)
    for parameter in other.parameters():
        parameter.data.normal_()
    for base, said in ((narrow, "2: the base does not fit"), (short, "4: the base does not fit.*no such module")):
        with pytest.raises(ValueError, match=f"^{said}"):
            inspect(folder, base)
    with pytest.raises(ValueError, match=r"^0: .*another"):
        inspect(folder, other)
    assert not any(isinstance(module, SpectralLinear) for module in other.modules())


def test_the_base_is_left_as_it_is(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    base = bases.stack()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    inspect(folder, base)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert base.state_dict().keys() == before.keys()


# Reports ----------------------------------------------------------------------------------------------------------


def test_dictionaries_are_json(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    for report in (spectrum(bases.stack()), inspect(folder), inspect(folder, bases.stack(), against=folder)):
        held = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert [module["module"] for module in held["modules"]] == TARGETS
        assert len(held["modules"][0]["values"]) == (12 if held["report"] == "spectrum" else 8)
        assert len({tuple(row) for row in report.rows()}) == 1  # one set of columns


def test_summaries_say_what_matters(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    text = spectrum(bases.fresh(), ranks=[8]).summary()
    assert text.startswith("14 weights of 7 kinds.")
    assert "k_proj (32 x 64): effective rank" in text
    assert "leaves whole: k_proj, v_proj, down_proj" in text
    assert inspect(folder).summary().startswith("kasa of rank 4 in 3 modules; 444 numbers trained")


def test_a_report_is_a_value() -> None:
    report = spectrum(bases.stack(), ranks=[8, 4, 4])
    assert report.ranks == (4, 8)
    assert report.marked == 8
    assert replace(report, ranks=(4,)).marked == 4
    assert not isinstance(report, AdapterReport)
