"""Small weights of one shape decomposed together when an adapter starts, as on CUDA, here on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from bases import fresh, load, logits, move
from members import MEMBERS, VARIANTS, Member
from peft import PeftModel, get_peft_model

from peft_kasa import LoRAXSConfig, PiSSAConfig, Site, SpectralConfig, Start
from peft_kasa.adapter.starting import all_layers
from peft_kasa.spectral import Engine, stacks
from peft_kasa.spectral.plan import Ask, Given

ALL = [*MEMBERS, *VARIANTS]
SIZES = [4, 4, 4]  # of batches: q and o, k and v, gate and up of two layers; down_proj has too few


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each batch had, with batches on the CPU too."""
    sizes: list[int] = []
    cuts = stacks.cuts

    def noted(weights: Any, *given: Any) -> Any:
        sizes.append(len(weights))
        return cuts(weights, *given)

    monkeypatch.setattr(stacks, "_devices", {"cpu"})
    monkeypatch.setattr(stacks, "cuts", noted)
    return sizes


@pytest.mark.parametrize("member", ALL, ids=str)
def test_a_start_together_is_the_start_alone(member: Member, batches: list[int], monkeypatch: Any) -> None:
    together = get_peft_model(fresh(), member.config())
    count = len(batches)
    monkeypatch.setattr(stacks, "_devices", {"cuda"})
    alone = get_peft_model(fresh(), member.config())
    assert len(batches) == count
    assert torch.allclose(logits(together), logits(alone), atol=1e-4)
    for one, other in zip(all_layers(together), all_layers(alone), strict=True):
        a, b = one.lowrank("default").dense(), other.lowrank("default").dense()
        assert torch.allclose(a, b, atol=1e-4 * max(1, b.abs().max().item()))


def test_layers_of_one_shape_are_one_batch(batches: list[int]) -> None:
    get_peft_model(fresh(), PiSSAConfig(r=4, target_modules="all-linear"))
    assert batches == SIZES


def test_ranks_and_shapes_are_told_apart(batches: list[int]) -> None:
    pattern = {"up_proj": 5, "layers.0.self_attn.q_proj": 3, "k_proj": 5}
    model = get_peft_model(fresh(), PiSSAConfig(r=4, target_modules="all-linear", rank_pattern=pattern))
    assert batches == []  # no four are alike
    assert {layer.adapters["default"].rank for layer in all_layers(model)} == {3, 4, 5}


def test_what_a_start_asks_is_known_before_it_runs() -> None:
    def asks(member: Member) -> list[Any]:
        return next(all_layers(get_peft_model(fresh(), member.config()))).adapters["default"].asks

    known = {str(member): asks(member) for member in ALL}
    assert known["kasa"] == [Ask(4, "bottom")]
    assert known["pissa"] == [Ask(4, "top")]
    assert known["lora_sb"] == [None]  # of a gradient
    assert known["nlora"] == []


def test_a_compact_checkpoint_is_read_together(
    tiny: str, tmp_path: Path, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_devices", {"cuda"})
    model = get_peft_model(load(tiny), LoRAXSConfig(r=4, target_modules="all-linear", save_frames=False))
    move(model)
    model.save_pretrained(str(tmp_path))
    monkeypatch.setattr(stacks, "_devices", {"cpu"})
    again = PeftModel.from_pretrained(load(tiny), str(tmp_path))
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    assert batches == SIZES


def test_one_that_misses_the_gate_goes_alone(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    computed = Engine._computed
    monkeypatch.setattr(Engine, "_computed", lambda self, *args: names.append(args[3]) or computed(self, *args))
    base = fresh()
    base.model.layers[0].self_attn.q_proj.weight.data.zero_()
    get_peft_model(base, PiSSAConfig(r=4, target_modules=["q_proj", "o_proj"]))
    assert batches == SIZES[:1]
    assert names == ["model.layers.0.self_attn.q_proj"]


@dataclass(repr=False)
class OfGradientConfig(SpectralConfig):
    """Starts from the cut of another matrix, asked for as that of the weight is."""

    name = "test_of_gradient"
    needs = "gradients"

    def start(self, site: Site) -> Start:
        return Start(site.svd(site.rank, of=site.gradient).split(), ("core",))


def test_the_cut_of_another_matrix_is_not_that_of_the_weight(batches: list[int]) -> None:
    statistics = bases.statistics("gradients")
    config = OfGradientConfig(r=4, target_modules=["q_proj", "o_proj"], statistics=statistics)
    model = get_peft_model(fresh(), config)
    assert batches == []
    for layer in all_layers(model):
        gradient = statistics.evidence(layer.name)
        found = layer.lowrank("default").dense()
        u, s, vt = torch.linalg.svd(gradient.double())
        expected = (u[:, :4] * s[:4]) @ vt[:4]
        assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_an_answer_is_of_its_matrix_alone() -> None:
    one, other = torch.eye(3), torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    given = Given(one, Engine()(one, 1), Ask(1, "top"), Engine())
    assert given(one, 1).s.item() == 1
    assert given(other, 1).s.item() == pytest.approx(3)
    assert given(one, 2).s.shape == (2,)
