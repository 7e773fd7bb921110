"""The file of a requantised base: bit for bit, or refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import load, logits, steps
from members import Member
from peft import PeftModel, get_peft_model
from residual import ABLE, PISSA, bits, requantized, same
from safetensors.torch import load_file, save_file

from peft_kasa import KaSAConfig, PiSSAConfig, load_requantized, save_requantized
from peft_kasa.adapter.requantized_file import FILE

pytest.importorskip("bitsandbytes")
each_able = pytest.mark.parametrize("member", ABLE, ids=str)


@each_able
@pytest.mark.parametrize("kind", ["nf4", "nf4 single"])
def test_a_saved_base_comes_back_bit_for_bit(member: Member, kind: str, tiny: str, tmp_path: Path) -> None:
    model = requantized(member, tiny, kind)
    steps(model, 2)
    model.save_pretrained(tmp_path)
    save_requantized(model, tmp_path)
    expected, held = logits(model), list(bits(model))
    with pytest.warns(UserWarning, match="The base is not the one the adapter was made on"):
        again = PeftModel.from_pretrained(load(tiny, kind), tmp_path)
    load_requantized(again, tmp_path)
    assert same(bits(again), held)
    assert torch.equal(logits(again), expected)


def test_an_adapter_for_the_saved_base_loads_onto_it_without_a_warning(tiny: str, tmp_path: Path) -> None:
    model = requantized(PISSA, tiny)
    model.save_pretrained(tmp_path)
    save_requantized(model, tmp_path)
    again = get_peft_model(load(tiny, "nf4"), KaSAConfig(r=4, target_modules="all-linear"), adapter_name="other")
    load_requantized(again, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*The base is not the one")
        again.load_adapter(tmp_path, "default")
    again.set_adapter("default")
    assert torch.equal(logits(again), logits(model))


@pytest.fixture(scope="module")
def saved(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requantized")
    save_requantized(requantized(PISSA, tiny), folder)
    return folder


def shorter(name: str, value: torch.Tensor) -> torch.Tensor:
    return value[:-1] if name.endswith(".absmax") else value


def broken(name: str, value: torch.Tensor) -> torch.Tensor:
    return torch.full_like(value, torch.nan) if name.endswith(".up") else value


def other_code(name: str, value: torch.Tensor) -> torch.Tensor:
    return value + 0.1 if name.endswith(".code") else value


def other_type(name: str, value: torch.Tensor) -> torch.Tensor:
    return value.char() if name.endswith("proj.weight") else value


def strange(name: str, value: torch.Tensor) -> torch.Tensor:
    return value + 1 if name.endswith(".fingerprint") else value


DAMAGE = [
    (shorter, "has to hold"),
    (broken, "has to be finite"),
    (other_code, "has to be of nf4"),
    (other_type, "weight has to be torch.uint8"),
    (strange, "belongs to another 4-bit base"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_a_file_that_does_not_fit_changes_nothing(
    damage: Any, message: str, tiny: str, saved: Path, tmp_path: Path
) -> None:
    tensors = {name: damage(name, value).contiguous() for name, value in load_file(saved / FILE).items()}
    save_file(tensors, tmp_path / FILE)
    model = get_peft_model(load(tiny, "nf4"), PISSA.config(r=8))
    before = list(bits(model))
    with pytest.raises(ValueError, match=f"(?s)model.layers.*{message}"):
        load_requantized(model, tmp_path)
    assert same(bits(model), before)


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("fp32", "all-linear", "has to be bitsandbytes 4-bit"),
        ("int8", "all-linear", "has to be bitsandbytes 4-bit"),
        ("nf4 single", "all-linear", "has to hold"),
        ("nf4", ["q_proj"], "have to be wrapped"),
    ],
)
def test_another_base_is_refused(kind: str, targets: Any, message: str, tiny: str, saved: Path) -> None:
    model = get_peft_model(load(tiny, kind), PiSSAConfig(r=8, target_modules=targets))
    with pytest.raises(ValueError, match=message):
        load_requantized(model, saved)


def test_a_file_that_was_cut_short_is_refused_in_words(saved: Path, tiny: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes((saved / FILE).read_bytes()[:1000])
    model = get_peft_model(load(tiny, "nf4"), PISSA.config(r=8))
    held = list(bits(model))
    with pytest.raises(ValueError, match=r"requantized\.safetensors is damaged or was cut short \(1000 bytes"):
        load_requantized(model, tmp_path)
    assert same(bits(model), held)
