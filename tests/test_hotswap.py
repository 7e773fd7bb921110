"""One adapter's values in the place of another's, in a model that may be compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bases import load, logits, move, stack, tokens
from members import MEMBERS, Member
from peft import PeftModel, get_peft_model
from peft.utils import hotswap
from torch._dynamo.utils import counters

from peft_kasa import KaSAConfig, NLoRAConfig, PiSSAConfig, SpectralConfig, hotswap_adapter

each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)
TARGETS = ["q_proj", "up_proj"]


def saved(config: SpectralConfig, base: torch.nn.Module, folder: Path, seed: int = 1) -> PeftModel:
    """A moved adapter that lies in the folder."""
    model = get_peft_model(base, config)
    move(model, seed=seed)
    model.save_pretrained(str(folder))
    return model.eval()


@each_member
def test_values_are_swapped_in_place(member: Member, tiny: str, tmp_path: Path) -> None:
    config = {"r": 4, "target_modules": TARGETS, "alpha": 6.0}
    model = saved(member.config(**config), load(tiny), tmp_path / "one")
    one, places = logits(model), {name: value.data_ptr() for name, value in model.named_parameters()}
    other = logits(saved(member.config(**config), load(tiny), tmp_path / "two", seed=2))
    assert not torch.equal(one, other)
    hotswap_adapter(model, tmp_path / "two")
    assert torch.equal(logits(model), other)
    hotswap_adapter(model, str(tmp_path / "one"))
    assert torch.equal(logits(model), one)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == places


def test_a_compiled_model_is_not_compiled_again(tiny: str, tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": TARGETS}
    other = logits(saved(KaSAConfig(**config), load(tiny), tmp_path / "two", seed=2))
    model = saved(KaSAConfig(**config), load(tiny), tmp_path / "one")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(input_ids=tokens())
        before = counters["stats"]["unique_graphs"]
        hotswap_adapter(compiled, tmp_path / "two")
        found = compiled(input_ids=tokens()).logits
    assert counters["stats"]["unique_graphs"] == before > 0
    assert (found - other).norm() < 1e-5 * other.norm()
    torch._dynamo.reset()


ONE = {"r": 2, "target_modules": ["0", "2"]}
REFUSED = [
    (KaSAConfig(**ONE), "has to be a NLoRAConfig. Found 'KaSAConfig'"),
    (NLoRAConfig(**ONE, variant="slora"), "variant has to be 'nlora', as in the loaded adapter. Found 'slora'"),
    (NLoRAConfig(**ONE, alpha=7.0), r"0: the scale .* has to be 1, as in the loaded adapter. Found 3.5"),
    (NLoRAConfig(r=3, target_modules=["0", "2"]), r"0: \w+ has to be of shape"),
    (NLoRAConfig(r=2, target_modules=["0"]), r"2: the adapter's file lacks"),
    (NLoRAConfig(r=2, target_modules=["0", "2", "4"]), r"4: the adapter's file has \w+, which nothing"),
    (NLoRAConfig(**ONE, save_frames=False), "save_frames has to be True, as in the loaded adapter"),
    (NLoRAConfig(**ONE, modules_to_save=["4"]), r"has to train its updates only.*Found \['4'\]"),
]


@pytest.mark.parametrize(("config", "said"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_does_not_fit_is_refused(config: SpectralConfig, said: str, tmp_path: Path) -> None:
    saved(config, stack(), tmp_path)
    model = get_peft_model(stack(), NLoRAConfig(**ONE))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        hotswap_adapter(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_merged_adapter_is_refused(tmp_path: Path) -> None:
    model = saved(PiSSAConfig(**ONE), stack(), tmp_path)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"0: adapter 'default' has to be unmerged"):
        hotswap_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"0: adapter 'default' has to be unmerged"):
        model.load_adapter(str(tmp_path), "default")


def test_another_adapter_may_be_merged(tmp_path: Path) -> None:
    """The file is checked against the base weight without what is merged into it, which stays merged."""
    model = saved(NLoRAConfig(**ONE), stack(), tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    move(model, seed=2)
    model.add_adapter("other", PiSSAConfig(**ONE))
    model.set_adapter("other")
    move(model, size=0.5)
    model.merge_adapter(["other"])
    merged = model.base_model.model[0].stored.clone()
    hotswap_adapter(model, tmp_path)
    assert torch.equal(model.base_model.model[0].stored, merged)
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_peft_refuses_to_swap_by_itself(tmp_path: Path) -> None:
    model = saved(PiSSAConfig(**ONE), stack(), tmp_path)
    with pytest.raises(ValueError, match=r"only supports.*PEFT_KASA was passed"):
        hotswap.hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
