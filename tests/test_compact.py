"""Checkpoints without frames: small, exact where the base gives the frames again, and refused by name where not."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import bases
import pytest
import torch
from bases import FLOATS, load, logits, move, stack
from members import MEMBERS, VARIANTS, Member
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_checkpoints import change
from torch import Tensor, nn

from peft_kasa import LoRAXSConfig, PiSSAConfig, SpectralLinear, SVFConfig, SVFTConfig
from peft_kasa.adapter.files import anchors
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


# What a file holds ------------------------------------------------------------------------------------------------


def check_file(member: Member, make: Callable[[], nn.Module], folder: Path) -> None:
    model, compact = saved(member, make(), folder / "compact")
    slots = layers_of(model)[0].slots("default")
    frozen = ((FRAMES | {"left", "core", "right"}) - set(member.learns)) & slots.keys()
    vectors = {f"anchor_{name}" for name in frozen & {*anchors.DOWN, *anchors.ACROSS}}
    expected = {*member.learns, "fingerprint", *vectors, *({"fixed"} & slots.keys())}
    tensors = held(compact)
    for layer in layers_of(model):
        assert {key.rpartition(".")[2] for key in tensors if f".{layer.name}." in key} == expected
    assert len(tensors) == len(expected) * len(layers_of(model))
    _, path = saved(member, make(), folder / "full", save_frames=True)
    full = held(path)
    assert slots_in(path) == slots.keys() - vectors
    sizes = [sum(value.numel() for value in file.values()) for file in (tensors, full)]
    assert sizes[0] < sizes[1] if frozen else sizes[0] == sizes[1]
    for key in (key for key in tensors if ".anchor_" not in key):
        rounding = 1e-2 if key.endswith(".fixed") else 0  # a 4-bit weight is taken as repacked
        assert torch.allclose(tensors[key], full[key], rounding, 0)


@each_member
@each_storage
def test_a_file_holds_what_learns_and_what_tells_the_frames(
    member: Member, kind: str, tiny: str, tmp_path: Path
) -> None:
    check_file(member, lambda: load(tiny, kind), tmp_path)


@pytest.mark.parametrize("member", OTHERS, ids=str)
def test_a_file_of_a_variant_does_too(member: Member, tmp_path: Path) -> None:
    check_file(member, stack, tmp_path)


def test_files_are_of_the_size_that_is_counted(tmp_path: Path) -> None:
    """LoRA-XS at r = 16 on 512 x 512: 256 numbers for the core, 4 r to tell its frames and 64 to tell the base."""
    sizes = []
    for save_frames in (False, True):
        config = LoRAXSConfig(r=16, save_frames=save_frames, target_modules=["0"])
        get_peft_model(nn.Sequential(nn.Linear(512, 512)), config).save_pretrained(str(tmp_path / str(save_frames)))
        sizes.append(sum(value.numel() for value in held(str(tmp_path / str(save_frames))).values()))
    assert sizes == [16 * 16 + 2 * 2 * 16 + 64, 16 * 16 + 2 * 512 * 16 + 64]


@pytest.mark.parametrize("member", [member for member in MEMBERS if member.config_class.needs], ids=str)
def test_what_came_from_data_is_not_left_out(member: Member) -> None:
    with pytest.raises(ValueError, match=r"save_frames has to be True: what comes from data cannot be computed again"):
        member.config(save_frames=False)
    assert member.config().keeps_frames


@each_member
def test_svf_and_svft_are_compact_unless_told(member: Member, tmp_path: Path) -> None:
    default = member.config_class in (SVFConfig, SVFTConfig)
    assert member.config().keeps_frames is not default
    _, folder = saved(member, stack(), tmp_path, save_frames=None)
    assert any(slot.startswith("anchor_") for slot in slots_in(folder)) == default


# Loading ----------------------------------------------------------------------------------------------------------


@each_member
@each_storage
def test_reload_is_exact(member: Member, kind: str, tiny: str, tmp_path: Path) -> None:
    model, path = saved(member, load(tiny, kind), tmp_path, rank_pattern={"q_proj": 6})
    expected = logits(model)
    assert not torch.equal(expected, logits(load(tiny, kind)))
    for low in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=FutureWarning)
            again = PeftModel.from_pretrained(load(tiny, kind), path, low_cpu_mem_usage=low)
        assert torch.equal(logits(again), expected)
        assert same_slots(model, again)
        assert not any(layer.adapters["default"].awaiting for layer in layers_of(again))


@pytest.mark.parametrize("member", OTHERS, ids=str)
def test_reload_of_a_variant_is_exact(member: Member, tmp_path: Path) -> None:
    model, path = saved(member, stack(), tmp_path)
    expected = output(model)
    for low in (False, True):
        again = PeftModel.from_pretrained(stack(), path, low_cpu_mem_usage=low)
        assert torch.equal(output(again), expected)
        assert same_slots(model, again)


@each_member
def test_auto_classes_read_it(member: Member, tiny: str, tmp_path: Path) -> None:
    model, folder = saved(member, load(tiny), tmp_path, task_type="CAUSAL_LM")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), logits(model))


@each_variant
def test_a_reloaded_adapter_trains_on_with_its_optimizer(member: Member, tmp_path: Path) -> None:
    """Saved after two steps, with the optimizer's state, and loaded: the third step is that of an unbroken run."""
    model, folder = saved(member, stack(), tmp_path / "start")
    again = PeftModel.from_pretrained(stack(), folder, is_trainable=True)
    optimizers = [torch.optim.AdamW(bases.learning(each), lr=1e-2) for each in (model, again)]
    for _ in range(2):
        assert _step(model, optimizers[0]) == _step(again, optimizers[1])
    again.save_pretrained(str(tmp_path / "two"))
    third = PeftModel.from_pretrained(stack(), str(tmp_path / "two"), is_trainable=True)
    optimizer = torch.optim.AdamW(bases.learning(third), lr=1e-2)
    optimizer.load_state_dict(optimizers[1].state_dict())
    losses = [(_step(model, optimizers[0]), _step(third, optimizer)) for _ in range(2)]
    assert all(unbroken == resumed for unbroken, resumed in losses)
    assert torch.equal(output(third), output(model))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(7))
    loss = model.train()(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


FRESH = """
import sys, torch
import test_compact
from peft import PeftModel
folder, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
found = {}
for member in test_compact.LARGE:
    model = PeftModel.from_pretrained(test_compact.large(), f"{folder}/{member}")
    found[str(member)] = test_compact.frames(model)
torch.save(found, out)
"""


LARGE = [member for member in FREE if member.name in ("kasa", "pissa", "svft", "svf", "spectral_adapter")]


def large() -> nn.Sequential:
    """A layer whose decomposition takes more than one thread, if it may."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 270))


def frames(model: nn.Module) -> dict[str, float]:
    """The sum of each slot's bits, as whole numbers."""
    slots = layers_of(model)[0].slots("default")
    return {name: value.detach().view(torch.int32).sum(dtype=torch.int64).item() for name, value in slots.items()}


def test_a_fresh_process_with_another_number_of_threads_gives_the_same_bits(tmp_path: Path) -> None:
    expected = {}
    for member in LARGE:
        model, _ = saved(member, large(), tmp_path / str(member), target_modules=["0"], r=24)
        expected[str(member)] = frames(model)
    other = 2 if torch.get_num_threads() == 1 else 1
    environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.abspath(__file__)), "OMP_NUM_THREADS": str(other)}
    command = [sys.executable, "-c", FRESH, str(tmp_path), str(tmp_path / "out.pt"), str(other)]
    subprocess.run(command, check=True, env=environment)
    assert torch.load(tmp_path / "out.pt", weights_only=False) == expected


# Other bases ------------------------------------------------------------------------------------------------------


@each_member
@each_storage
def test_another_storage_is_refused(member: Member, kind: str, tiny: str, tmp_path: Path) -> None:
    """Where a full checkpoint would load with a warning: without frames, what is learnt would act on others."""
    _, compact = saved(member, load(tiny, kind), tmp_path / "compact", target_modules=["q_proj"])
    for other in STORAGES:
        if other != kind:
            remedy = "Load the base as it was trained on, or save the adapter with save_frames=True"
            with pytest.raises(ValueError, match=rf"layers\.0\.self_attn\.q_proj: .*holds no frames.*{remedy}"):
                PeftModel.from_pretrained(load(tiny, other), compact)


@each_variant
@pytest.mark.parametrize(("made", "used"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp16")])
def test_another_storage_of_the_same_numbers_is_right(member: Member, made: str, used: str, tmp_path: Path) -> None:
    """A base in bfloat16 is the same in float32, and back: the frames are those that were trained beside."""

    def base(kind: str) -> nn.Module:
        model = stack().bfloat16()
        for parameter in model.parameters():
            parameter.data[parameter.data.abs() < 2.0**-6] = 0.0  # float16 has bfloat16's digits, but not its range
        return model.to(FLOATS[kind])

    for save_frames in (False, True):
        saved(member, base(made), tmp_path / str(save_frames), save_frames=save_frames)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        compact, full = (PeftModel.from_pretrained(base(used), str(tmp_path / flag)) for flag in ("False", "True"))
    for ours, theirs in zip(layers_of(compact), layers_of(full), strict=True):
        assert all(torch.equal(ours.slots("default")[slot], value) for slot, value in theirs.slots("default").items())
    x = torch.ones(2, 24, dtype=FLOATS[used])
    assert torch.equal(compact(x), full(x))


@each_variant
def test_another_model_of_the_same_shape_is_refused(member: Member, tmp_path: Path) -> None:
    _, folder = saved(member, stack(), tmp_path)
    other = stack()
    torch.manual_seed(9)
    nn.init.normal_(other[2].weight, 0, 0.2)
    is_refused(folder, other, "2: the adapter was trained on another weight", "Load the base model")


@each_variant
def test_a_relative_of_the_base_is_refused(member: Member, tmp_path: Path) -> None:
    """A little more training of the base: near enough for a full checkpoint, not for a compact one."""
    _, folder = saved(member, stack(), tmp_path)
    other = stack()
    with torch.no_grad():
        other[2].weight.add_(1e-3 * torch.randn(20, 12, generator=torch.Generator().manual_seed(5)))
    is_refused(folder, other, "2: the adapter's file holds no frames", "save_frames=True")


@each_member
@pytest.mark.parametrize("first", ["made", "used"])
@pytest.mark.parametrize("kind", ["nf4", "nf4 single"])
def test_a_four_bit_base_may_have_been_evaluated_before(
    member: Member, first: str, kind: str, tiny: str, tmp_path: Path
) -> None:
    """On some CPUs bitsandbytes rounds the scales of a 4-bit weight then, for good: the frames are the same still."""
    made, used = load(tiny, kind), load(tiny, kind)
    logits(made if first == "made" else used)
    model, folder = saved(member, made, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        again = PeftModel.from_pretrained(used, folder)
    assert same_slots(model, again)
    expected = logits(model)
    assert (logits(again) - expected).norm() <= 0.05 * expected.norm()  # the base itself is a little another


# Frames that come out otherwise -----------------------------------------------------------------------------------


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


@each_decomposed
def test_flipped_signs_are_put_right(member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = saved(member, stack(), tmp_path)
    altered(monkeypatch, flipped)
    again = PeftModel.from_pretrained(stack(), folder)
    assert torch.equal(output(again), output(model))
    assert same_slots(model, again)
    monkeypatch.setattr(anchors, "aligned", lambda frames, saved: frames)  # without which they would be wrong:
    wrong = PeftModel.from_pretrained(stack(), folder)
    assert not same_slots(model, wrong)
    assert (str(member) in SIGNLESS) == torch.allclose(output(wrong), output(model), atol=1e-4)


@each_member
@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_flipped_signs_are_put_right_on_every_storage(
    member: Member, kind: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved(member, load(tiny, kind), tmp_path, target_modules=["q_proj"])
    altered(monkeypatch, flipped)
    assert torch.equal(logits(PeftModel.from_pretrained(load(tiny, kind), folder)), logits(model))


@each_decomposed
@pytest.mark.parametrize("low", [False, True])
def test_vectors_that_have_turned_are_refused_by_name(
    member: Member, low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved(member, stack(), tmp_path)
    altered(monkeypatch, rotated(0.01))
    said = (r"[024]: \w*(left|right)0?, computed again", r"in vector \d+ \(by \d\.\de-0", "save_frames=True")
    is_refused(folder, stack(), *said, low=low)


@each_decomposed
def test_vectors_that_have_turned_a_little_will_do(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved(member, stack(), tmp_path)
    altered(monkeypatch, rotated(1e-5))
    again = PeftModel.from_pretrained(stack(), folder)
    assert (output(again) - output(model)).norm() <= 1e-4 * output(model).norm()


@pytest.mark.parametrize("angle", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("slot", ["left", "cut_right"])
def test_a_turn_is_found_whatever_the_pair(angle: float, slot: str) -> None:
    """An anchor is two random products: of any pair of vectors, whatever their norms."""
    generator, missed = torch.Generator().manual_seed(0), 0
    turn = torch.tensor([[1.0, -angle], [angle, 1.0]]) / (1 + angle**2) ** 0.5
    norms = 10.0 ** -torch.arange(6)
    for size in range(20, 60):
        q = torch.linalg.qr(torch.randn(size, 6, generator=generator))[0]
        for first in range(5):
            other = q.clone()
            other[:, first : first + 2] = q[:, first : first + 2] @ turn
            known, found = ((part * norms) if slot == "left" else (part * norms).T for part in (q, other))
            kept = anchors.anchors({slot: known}, ())
            said = refusal(lambda found=found, kept=kept: anchors.aligned({slot: found}, kept))
            missed += not said
            assert not said or said.startswith(f"{slot}, computed again")
            assert not said or any(f"in vector {index} " in said for index in (first, first + 1))
    assert missed <= 1  # of 200


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_anchors_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[next(key for key in tensors if ".anchor_" in key)][1, 2] = bad

    for member in (FREE[0], FREE[5], FREE[7]):
        _, folder = saved(member, stack(), tmp_path / member.name)
        change(folder, spoil)
        is_refused(
            folder, stack(), r"[024]: anchor_\w+ in the adapter's file has NaN or infinite entries", "Use another"
        )
    frames = {"left": torch.eye(5)[:, :3]}
    kept = anchors.anchors(frames, ())
    kept["anchor_left"][1, 2] = bad
    with pytest.raises(ValueError, match=r"left, computed again .* in vector 2"):
        anchors.aligned(frames, kept)


def test_a_missing_anchor_is_refused(tmp_path: Path) -> None:
    for member in (FREE[0], FREE[5], FREE[7]):
        _, folder = saved(member, stack(), tmp_path / member.name)
        change(folder, lambda tensors: tensors.__delitem__(next(key for key in tensors if ".anchor_" in key)))
        is_refused(folder, stack(), "lacks anchor_", "save it again")


def test_frames_that_are_not_finite_are_refused() -> None:
    frames = {"right": torch.eye(5)[:3]}
    kept = anchors.anchors(frames, ())
    frames["right"][2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"right, computed again .* in vector 2"):
        anchors.aligned(frames, kept)


# Weights that leave a choice --------------------------------------------------------------------------------------


def _rotation(seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(seed)))[0]


CHOICES = {
    "identity": torch.eye(24),
    "rotation": 3 * _rotation(2),
    "pairs": _rotation(3) * (torch.arange(24) // 2 + 1) @ _rotation(4),
    "low rank": torch.randn(24, 3, generator=torch.Generator().manual_seed(1)) @ torch.eye(24)[:3],
    "zero": torch.zeros(24, 24),
}


@each_variant
@pytest.mark.parametrize("weight", CHOICES.values(), ids=CHOICES)
def test_repeated_singular_values_come_out_the_same_again(member: Member, weight: Tensor, tmp_path: Path) -> None:
    def base() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(24, 24))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        return model

    torch.manual_seed(0)
    model, folder = saved(member, base(), tmp_path, target_modules=["0"])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(base(), folder)
    assert same_slots(model, again)
    assert torch.equal(output(again), output(model))
    assert torch.isfinite(output(model)).all()


def test_a_choice_that_falls_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orthogonal weight's vectors may be any: if they come out otherwise, what was learnt is not put on them."""
    base = nn.Sequential(nn.Linear(24, 24))
    nn.init.orthogonal_(base[0].weight)
    lora_xs = next(member for member in FREE if member.name == "lora_xs")
    _, folder = saved(lora_xs, base, tmp_path, target_modules=["0"])
    altered(monkeypatch, rotated(0.7))
    twin = nn.Sequential(nn.Linear(24, 24))
    twin.load_state_dict({"weight": base[0].base_layer.weight, "bias": base[0].base_layer.bias}, strict=False)
    with torch.no_grad():
        twin[0].weight.copy_(base[0].base_layer.weight)
    is_refused(folder, twin, "0: left, computed again from the base weight, differs")


# Other loaders ----------------------------------------------------------------------------------------------------


@each_member
def test_transformers_loader_computes_the_frames_at_first_use(
    member: Member, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved(member, load(tiny), tmp_path)
    expected = logits(model)
    altered(monkeypatch, flipped)
    again = load(tiny)
    again.load_adapter(folder)
    for layer in layers_of(again):
        left_out = layer.slots("default").keys() - slots_in(folder)
        assert layer.adapters["default"].awaiting
        assert all(torch.isnan(layer.slots("default")[slot]).all() for slot in left_out)
    assert torch.equal(logits(again), expected)
    assert same_slots(model, again)
    if member in DECOMPOSED:
        monkeypatch.undo()
        altered(monkeypatch, rotated(0.01))
        again = load(tiny)
        again.load_adapter(folder)
        for _ in range(2):  # it stays refused
            with pytest.raises(ValueError, match=r"_proj: .*computed again"):
                logits(again)


@each_variant
def test_load_state_dict_computes_the_frames_at_first_use(member: Member, tmp_path: Path) -> None:
    model, folder = saved(member, stack(), tmp_path)
    expected = output(model)
    again = get_peft_model(stack(), PeftConfig.from_pretrained(folder))
    kept = {*slots_in(folder), "weight", "bias"}
    state = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[2] in kept}
    again.load_state_dict(state, strict=False)
    assert all(layer.adapters["default"].awaiting for layer in layers_of(again))
    assert torch.equal(output(again), expected)
    assert same_slots(model, again)
    whole = get_peft_model(stack(), PeftConfig.from_pretrained(folder))
    whole.load_state_dict(model.state_dict())
    assert torch.equal(output(whole), expected)


def test_half_a_file_is_refused_at_first_use(tmp_path: Path) -> None:
    for member in (FREE[1], FREE[6]):
        model, folder = saved(member, stack(), tmp_path / member.name)
        again = get_peft_model(stack(), PeftConfig.from_pretrained(folder))
        state = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[2] in member.learns}
        again.load_state_dict(state, strict=False)
        with pytest.raises(ValueError, match=r"0: the file of adapter 'default' did not give .*fingerprint"):
            output(again)


# Several ----------------------------------------------------------------------------------------------------------


@each_variant
def test_a_compact_adapter_beside_a_full_one(member: Member, tmp_path: Path) -> None:
    full = get_peft_model(stack(), PiSSAConfig(r=4, target_modules=NAMES))
    move(full, seed=3)
    full.save_pretrained(str(tmp_path))
    model, _ = saved(member, stack(), tmp_path / "second")
    again = PeftModel.from_pretrained(stack(), str(tmp_path))
    again.load_adapter(str(tmp_path / "second"), "second")
    for name, expected in (("second", output(model)), ("default", output(full))):
        again.set_adapter(name)
        assert torch.equal(output(again), expected)
    again.save_pretrained(str(tmp_path / "both"))
    assert slots_in(str(tmp_path / "both" / "second")) == slots_in(str(tmp_path / "second"))
    third = PeftModel.from_pretrained(stack(), str(tmp_path / "both" / "second"), adapter_name="mine")
    third.load_adapter(str(tmp_path / "both"), "other")
    assert torch.equal(output(third), output(model))
    third.delete_adapter("mine")
    third.set_adapter("other")
    assert torch.equal(output(third), output(full))


@each_decomposed
def test_a_refused_second_adapter_leaves_the_first(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved(member, stack(), tmp_path)
    expected = output(model)
    altered(monkeypatch, rotated(0.01))
    with pytest.raises(ValueError, match="computed again"):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model), expected)


@each_member
def test_a_base_with_an_adapter_merged_into_it_is_read_without(member: Member, tmp_path: Path) -> None:
    """PEFT unmerges before it loads; if it did not, the base would be another."""
    model, folder = saved(member, stack(), tmp_path)
    again = get_peft_model(stack(), PiSSAConfig(r=4, target_modules=NAMES), adapter_name="first")
    move(again, seed=3)
    again.merge_adapter()
    again.load_adapter(folder, "second")
    again.set_adapter("second")
    assert torch.equal(output(again), output(model))


# Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "gate"])
def test_svf_keeps_one_frame_of_two(form: str) -> None:
    def slots(config: SVFConfig | SVFTConfig, m: int, n: int) -> dict[str, Tensor]:
        return layers_of(get_peft_model(nn.Sequential(nn.Linear(n, m)), config))[0].slots("default")

    tall = slots(SVFConfig(target_modules=["0"], form=form), 96, 40)
    assert all(96 not in value.shape for value in tall.values())
    assert [tuple(value.shape) for value in tall.values() if value.numel() > 80] == [(40, 40)]
    sizes = [
        sum(value.numel() for value in slots(config, 96, 96).values())
        for config in (SVFConfig(target_modules=["0"], form=form), SVFTConfig(target_modules=["0"]))
    ]
    assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.03)


# Over an adapter that is there, and after a cast ---------------------------------------------------------------

each_framed = pytest.mark.parametrize("member", [member for member in FREE if member.name != "nlora"], ids=str)


@each_framed
def test_a_refused_file_leaves_the_trained_adapter_it_was_to_replace(member: Member, tmp_path: Path) -> None:
    model, folder = saved(member, stack(), tmp_path)
    expected = output(model)
    change(folder, lambda tensors: [value.add_(1) for key, value in tensors.items() if "anchor_" in key])
    with pytest.raises(ValueError, match=r"computed again"):
        model.load_adapter(folder, "default")
    assert torch.equal(output(model), expected)


@each_framed
def test_save_frames_may_be_switched_after_training(member: Member, tmp_path: Path) -> None:
    model, _ = saved(member, stack(), tmp_path / "compact")
    expected = output(model)
    for flag in (True, False, True):
        model.peft_config["default"].save_frames = flag
        model.save_pretrained(str(tmp_path / str(flag)))
        again = PeftModel.from_pretrained(stack(), str(tmp_path / str(flag)))
        assert torch.equal(output(again), expected)
        assert any("anchor_" in slot for slot in slots_in(str(tmp_path / str(flag)))) != flag
        model = again


@each_member
def test_a_cast_of_the_model_loses_nothing_of_the_adapter(member: Member, tmp_path: Path) -> None:
    base = stack().bfloat16()
    model, folder = saved(member, base, tmp_path)
    for layer in layers_of(model.bfloat16()):
        assert {value.dtype for value in layer.slots("default").values()} == {torch.float32}
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(stack().bfloat16(), folder).bfloat16()
    again.load_adapter(folder, "default")
    assert same_slots(again, model)
