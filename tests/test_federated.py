"""Federated averages: the mean of the updates to rounding, or a refusal that names the folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import move, stack
from members import MEMBERS, VARIANTS, Member
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_kasa import SpectralLinear, SVFConfig, SVFTConfig, average_cores

NAMES = ["0", "2", "4"]
CORES = [member for member in [*MEMBERS, *VARIANTS] if member.learns == ("core",)]
LINEAR = [member for member in CORES if member.config(target_modules=NAMES).averages]
PLAIN = [  # as members of a federation, what is not linear by default
    Member("svft", SVFTConfig, True, 1, ("core",), defaults={"gate": False}, label="svft ungated"),
    Member(
        "svft",
        SVFTConfig,
        True,
        1,
        ("core",),
        defaults={"gate": False, "pattern": "random", "width": 1},
        label="svft random ungated",
    ),
]
BENT = [member for member in CORES if member not in LINEAR]
each_linear = pytest.mark.parametrize("member", [*LINEAR, *PLAIN], ids=str)
SB, XS = (next(member for member in MEMBERS if member.name == name) for name in ("lora_sb", "lora_xs"))


def clients(member: Member, folder: Path, count: int = 3, **given: Any) -> tuple[list[str], list[PeftModel]]:
    """Adapters that went on from one start, each its own way, and where they were saved."""
    start = get_peft_model(stack(), member.config(**({"target_modules": NAMES, "alpha": 6.0} | given)))
    start.save_pretrained(str(folder / "start"))
    folders, models = [], []
    for client in range(count):
        model = PeftModel.from_pretrained(stack(), str(folder / "start"), is_trainable=True)
        move(model, 0.5, seed=client)
        folders.append(str(folder / f"client{client}"))
        models.append(model)
        model.save_pretrained(folders[-1])
    return folders, models


def updates(model: nn.Module, adapter: str = "default") -> list[torch.Tensor]:
    layers = [module for module in model.modules() if isinstance(module, SpectralLinear)]
    return [layer.get_delta_weight(adapter).detach().double() for layer in layers]


def change(folder: str, **fields: Any) -> None:
    path = Path(folder, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit(folder: str, ending: str, value: float | None) -> str:
    """Changes one entry of the first tensor of that name, or drops it; its key."""
    path = os.path.join(folder, "adapter_model.safetensors")
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if key.endswith(ending))
    if value is None:
        del tensors[key]
    else:
        tensors[key].view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return key


def is_refused(folders: list[str], folder: Path, *said: str, **given: Any) -> None:
    """With all of these words, and nothing written."""
    with pytest.raises(ValueError, match=".*".join(said)):
        average_cores(folders, folder / "mean", **given)
    assert not (folder / "mean").exists()


# The mean ---------------------------------------------------------------------------------------------------------


def test_the_members_that_average_are_these() -> None:
    assert {str(member) for member in LINEAR} == {
        "svfit", "svf", "lora_xs", "lora_xs noisy", "lora_xs left", "lora_sb", "inttune", "svft top_k",
    }  # fmt: skip
    assert {str(member) for member in BENT} == {"svft", "svft plain", "svft random", "svf gate", "spectral_adapter"}


@each_linear
@pytest.mark.parametrize("weights", [None, [1, 2, 5], [0.25, 0.0, 0.5]])
def test_the_mean_of_cores_is_the_mean_of_updates(member: Member, weights: list[float] | None, tmp_path: Path) -> None:
    folders, models = clients(member, tmp_path)
    average_cores(folders, tmp_path / "mean", weights)
    mean = PeftModel.from_pretrained(stack(), str(tmp_path / "mean"))
    shares = [weight / sum(weights or [3]) for weight in weights or [1, 1, 1]]
    for index, found in enumerate(updates(mean)):
        exact = sum(share * updates(model)[index] for share, model in zip(shares, models, strict=True))
        assert (found - exact).norm() <= 1e-6 * max(updates(model)[index].norm() for model in models)
        assert exact.norm() > 0.05


@each_linear
def test_cores_are_summed_in_float64_and_rounded_once(member: Member, tmp_path: Path) -> None:
    folders, _ = clients(member, tmp_path, 5)
    average_cores(folders, tmp_path / "mean")
    files = [load_file(os.path.join(folder, "adapter_model.safetensors")) for folder in folders]
    mean = load_file(tmp_path / "mean" / "adapter_model.safetensors")
    assert mean.keys() == files[0].keys()
    for key, value in mean.items():
        if key.endswith(".core"):
            exact = torch.stack([file[key].double() for file in files]).mean(0)
            assert torch.allclose(value.double(), exact, rtol=1e-7, atol=1e-12)
        else:
            assert torch.equal(value, files[0][key])
    config = json.loads((tmp_path / "mean" / "adapter_config.json").read_text())
    assert config == json.loads((tmp_path / "client0" / "adapter_config.json").read_text())


def test_one_adapter_is_its_own_mean(tmp_path: Path) -> None:
    folders, models = clients(SB, tmp_path, 1)
    average_cores(folders, tmp_path / "mean")
    mean = PeftModel.from_pretrained(stack(), str(tmp_path / "mean"))
    assert all(torch.equal(a, b) for a, b in zip(updates(mean), updates(models[0]), strict=True))


def test_a_weight_of_zero_leaves_an_adapter_out(tmp_path: Path) -> None:
    folders, models = clients(XS, tmp_path, 2)
    average_cores(folders, tmp_path / "mean", [0, 3])
    mean = PeftModel.from_pretrained(stack(), str(tmp_path / "mean"))
    assert all(torch.equal(a, b) for a, b in zip(updates(mean), updates(models[1]), strict=True))


@pytest.mark.parametrize("save_frames", [True, False])
def test_compact_adapters_are_averaged_too(save_frames: bool, tmp_path: Path) -> None:
    folders, models = clients(XS, tmp_path, save_frames=save_frames)
    average_cores(folders, tmp_path / "mean")
    slots = {key.rpartition(".")[2] for key in load_file(tmp_path / "mean" / "adapter_model.safetensors")}
    assert slots == {"core", "fingerprint"} | ({"left", "right"} if save_frames else {"anchor_left", "anchor_right"})
    mean = PeftModel.from_pretrained(stack(), str(tmp_path / "mean"))
    for index, found in enumerate(updates(mean)):
        exact = sum(updates(model)[index] for model in models) / 3
        assert (found - exact).norm() <= 1e-6 * exact.norm()


def test_rounds_go_on_from_the_mean(tmp_path: Path) -> None:
    """The mean may take the place of a client's own folder, and be averaged again."""
    folders, models = clients(SB, tmp_path, 2)
    exact = [(a + b) / 2 for a, b in zip(*map(updates, models), strict=True)]
    average_cores(folders, folders[0])
    again = PeftModel.from_pretrained(stack(), folders[0], is_trainable=True)
    for found, expected in zip(updates(again), exact, strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    move(again, 0.5, seed=9)
    again.save_pretrained(str(tmp_path / "next"))
    average_cores([tmp_path / "next", folders[1]], tmp_path / "mean")
    PeftModel.from_pretrained(stack(), str(tmp_path / "mean"))


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", BENT, ids=str)
def test_cores_that_are_bent_functions_of_what_learns_are_refused(member: Member, tmp_path: Path) -> None:
    """The mean of gates is not the gate of the mean: it would be silently wrong."""
    folders, models = clients(member, tmp_path, 2)
    is_refused(folders, tmp_path, "client0: the core has to be linear in what learns")
    cores = [[model.base_model.model[index].value("default").core.detach() for model in models] for index in (0, 2, 4)]
    assert all(not torch.allclose(a, b) for a, b in cores)


@pytest.mark.parametrize("member", [m for m in [*MEMBERS, *VARIANTS] if m.learns != ("core",)], ids=str)
def test_adapters_that_learn_more_than_the_core_are_refused(member: Member, tmp_path: Path) -> None:
    folders, _ = clients(member, tmp_path, 1)
    is_refused(folders, tmp_path, "client0: only cores may learn", rf"Found \[.*'{member.learns[0]}'")


def test_frames_that_differ_are_refused(tmp_path: Path) -> None:
    for save_frames, slot in ((True, "left"), (True, "right"), (False, "anchor_left"), (True, "fingerprint")):
        place = tmp_path / f"{slot}"
        folders, _ = clients(XS, place, save_frames=save_frames)
        key = edit(folders[1], f".{slot}", 0.123)
        is_refused(folders, place, rf"client1: {key} differs from the first adapter's", "same frames", "save it once")


def test_clients_of_other_data_are_refused(tmp_path: Path) -> None:
    """LoRA-SB's frames come from the data: clients that start by themselves have others."""
    folders, _ = clients(SB, tmp_path, 1)
    other = get_peft_model(stack(), SB.config(target_modules=NAMES, alpha=6.0))
    for layer in (module for module in other.modules() if isinstance(module, SpectralLinear)):
        with torch.no_grad():
            layer.slots("default")["left"].neg_()
    other.save_pretrained(str(tmp_path / "other"))
    is_refused([*folders, str(tmp_path / "other")], tmp_path, r"other: \S+\.left differs", "one start")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "svfit"), ("r", 3), ("alpha", 7.0), ("use_rslora", True), ("rank_pattern", {"0": 4}),
        ("alpha_pattern", {"0": 2.0}),
    ],
)  # fmt: skip
def test_another_method_or_scale_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    folders, _ = clients(XS, tmp_path)
    change(folders[2], **{field: value})
    is_refused(folders, tmp_path, rf"client2: {field} has to be ", "as in the first adapter", "Found")


def test_another_method_is_refused_though_its_tensors_fit(tmp_path: Path) -> None:
    ours, _ = clients(XS, tmp_path / "xs", 1)
    theirs, _ = clients(SB, tmp_path / "sb", 1)
    is_refused([*ours, *theirs], tmp_path, "method has to be 'lora_xs'", "Found 'lora_sb'")


def test_missing_modules_are_refused(tmp_path: Path) -> None:
    folders, _ = clients(XS, tmp_path, 2)
    key = edit(folders[1], ".core", None)
    is_refused(folders, tmp_path, rf"client1: {key} is in one adapter and not in the other", "same modules")
    fewer, _ = clients(XS, tmp_path / "fewer", 1, target_modules=["0"])
    is_refused([folders[0], *fewer], tmp_path, "is in one adapter and not in the other")
    is_refused([*fewer, folders[0]], tmp_path, "is in one adapter and not in the other")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("client", [0, 1])
def test_cores_that_are_not_finite_are_refused(bad: float, client: int, tmp_path: Path) -> None:
    folders, _ = clients(XS, tmp_path, 2)
    key = edit(folders[client], ".core", bad)
    is_refused(folders, tmp_path, f"client{client}: {key} has to be finite")


def test_what_else_was_trained_is_refused_where_it_differs(tmp_path: Path) -> None:
    folders, _ = clients(XS, tmp_path, target_modules=["0", "2"], modules_to_save=["4"])
    is_refused(folders, tmp_path, r"client1: \S+4\.\w+ differs from the first adapter's, and only cores are averaged")
    same, _ = clients(XS, tmp_path / "same", 1, target_modules=["0", "2"], modules_to_save=["4"])
    average_cores([*same, *same], tmp_path / "same" / "mean")


def test_a_plain_lora_is_refused(tmp_path: Path) -> None:
    lora = get_peft_model(stack(), LoraConfig(r=2, target_modules=NAMES))
    lora.save_pretrained(str(tmp_path / "lora"))
    is_refused([str(tmp_path / "lora")], tmp_path, "lora: peft_type has to be PEFT_KASA. Found 'LORA'")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0], "weights has to have 2 entries, one a folder. Found 1"),
        ([1.0, 1.0, 1.0], "weights has to have 2 entries"),
        ([1.0, -1.0], "weights have to be finite numbers of at least 0"),
        ([0.0, 0.0], "one above it"),
        ([1.0, float("nan")], "weights have to be finite"),
        ([float("nan"), 1.0], "weights have to be finite"),
        ([1.0, float("inf")], "weights have to be finite"),
    ],
)
def test_weights_that_give_no_mean_are_refused(weights: list[float], said: str, tmp_path: Path) -> None:
    folders, _ = clients(XS, tmp_path, 2)
    is_refused(folders, tmp_path, said, weights=weights)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    is_refused([], tmp_path, "folders has to name at least one adapter")
    missing = str(tmp_path / "none")
    is_refused([missing], tmp_path, re.escape(missing), r"has no adapter_config\.json that can be read")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "adapter_config.json").write_text("{")
    is_refused([missing], tmp_path, re.escape(missing), r"has no adapter_config\.json that can be read")


# Interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["while writing", "before renaming"])
def test_an_interrupted_write_leaves_the_mean_before(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, _ = clients(XS, tmp_path, 3)
    average_cores(folders[:2], tmp_path / "mean")
    before = {path.name: path.read_bytes() for path in (tmp_path / "mean").iterdir()}
    assert before.keys() == {"adapter_model.safetensors", "adapter_config.json"}

    def cut_short(tensors: object, filename: str, **_: object) -> None:
        Path(filename).write_bytes(b"half of a fi")
        raise KeyboardInterrupt

    if moment == "while writing":
        monkeypatch.setattr("peft_kasa.sharing.federated.save_file", cut_short)
    else:
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        average_cores(folders[1:], tmp_path / "mean")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "mean").iterdir()} == before
    average_cores(folders[1:], tmp_path / "mean")
    assert (tmp_path / "mean" / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]


def test_svf_and_svft_say_so_themselves() -> None:
    assert [SVFConfig().averages, SVFConfig(form="gate").averages] == [True, False]
    assert [SVFTConfig().averages, SVFTConfig(gate=False).averages] == [False, True]
