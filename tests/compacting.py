"""What the tests of compact checkpoints share: members, trained adapters, files, refusals."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bases import FLOATS, move
from members import MEMBERS, VARIANTS, Member
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_kasa import SpectralLinear
from peft_kasa.spectral.spectrum import Spectrum

FREE = [member for member in MEMBERS if not member.config_class.needs]
OTHERS = [member for member in VARIANTS if not member.config_class.needs]
SLICED = ("nlora", "inttune", "slora", "nlora pinv")  # their frames are rows and columns of the weight, not vectors
DECOMPOSED = [member for member in [*FREE, *OTHERS] if str(member) not in SLICED]
SIGNLESS = ("kasa", "svfit", "svf", "svf gate", "svft plain")  # a pair of flipped signs cancels in what they learn
STORAGES = [*FLOATS, "nf4"]
FRAMES = {"left0", "core0", "right0", "cut_left", "cut_right"}
NAMES = ["0", "2", "4"]  # of the stack: wide, tall and square
TARGETS = ["q_proj", "down_proj"]  # of the tiny Llama: square and wide
each_member = pytest.mark.parametrize("member", FREE, ids=str)
each_variant = pytest.mark.parametrize("member", [*FREE, *OTHERS], ids=str)
each_decomposed = pytest.mark.parametrize("member", DECOMPOSED, ids=str)
each_storage = pytest.mark.parametrize("kind", STORAGES)


def saved(member: Member, base: nn.Module, folder: Path | str, **given: object) -> tuple[PeftModel, str]:
    """A trained adapter whose checkpoints are compact, and where it was saved. All triples for SVF and SVFT."""
    targets = NAMES if isinstance(base, nn.Sequential) else TARGETS
    defaults = {"save_frames": False, "alpha": 6.0, "target_modules": targets}
    ranks = {"r": None} if member.config_class.compact else {}
    model = get_peft_model(base, member.config(**(defaults | ranks | given)))
    move(model)
    model.save_pretrained(str(folder))
    return model, str(folder)


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    """Of a stack."""
    return model.eval()(torch.randn(5, 24, generator=torch.Generator().manual_seed(3)))


def layers_of(model: nn.Module) -> list[SpectralLinear]:
    return [module for module in model.modules() if isinstance(module, SpectralLinear)]


def held(folder: str) -> dict[str, Tensor]:
    return load_file(os.path.join(folder, "adapter_model.safetensors"))


def slots_in(folder: str) -> set[str]:
    return {key.rpartition(".")[2] for key in held(folder)}


def same_slots(one: nn.Module, other: nn.Module, adapter: str = "default") -> bool:
    pairs = [(a.slots(adapter), b.slots(adapter)) for a, b in zip(layers_of(one), layers_of(other), strict=True)]
    return all(torch.equal(a[slot], b[slot]) for a, b in pairs for slot in a.keys() | b.keys())


def is_refused(folder: str, base: nn.Module, *said: str, low: bool = False) -> None:
    """Loading has to fail with all of these words, and to leave the base as it was."""
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ValueError, match=".*".join(said)):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low)
    assert not layers_of(base)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def refusal(work: Callable[[], object]) -> str:
    """What work was refused with, or nothing."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


def altered(monkeypatch: pytest.MonkeyPatch, change_of: Callable[[Spectrum], Spectrum]) -> None:
    """Whatever is decomposed from here on comes out in another way."""
    signed = Spectrum.signed
    monkeypatch.setattr(Spectrum, "signed", lambda self: change_of(signed(self)))


def flipped(cut: Spectrum) -> Spectrum:
    sign = torch.where(torch.arange(len(cut.s)) % 3 == 1, -1.0, 1.0).to(cut.u)
    return Spectrum(cut.u * sign, cut.s, cut.v * sign[:, None])


def rotated(by: float) -> Callable[[Spectrum], Spectrum]:
    """Neighbouring triples mixed, as those of close singular values may be."""

    def change_of(cut: Spectrum) -> Spectrum:
        angle = torch.tensor(by, dtype=torch.float64)
        turn = torch.eye(len(cut.s), dtype=cut.u.dtype)
        for first in range(0, len(cut.s) - 1, 2):
            second = first + 1
            turn[first, first] = turn[second, second] = angle.cos()
            turn[first, second], turn[second, first] = -angle.sin(), angle.sin()
        return Spectrum(cut.u @ turn, cut.s, turn.T @ cut.v)

    return change_of


LARGE = [member for member in FREE if member.name in ("kasa", "pissa", "svft", "svf", "spectral_adapter")]


def large() -> nn.Sequential:
    """A layer whose decomposition takes more than one thread, if it may."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 270))


def frames(model: nn.Module) -> dict[str, float]:
    """The sum of each slot's bits, as whole numbers."""
    slots = layers_of(model)[0].slots("default")
    return {name: value.detach().view(torch.int32).sum(dtype=torch.int64).item() for name, value in slots.items()}
