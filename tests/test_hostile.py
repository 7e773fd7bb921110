"""Files from strangers: what is wrong in them is refused by name, before it costs anything, and the base stays."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from members import MEMBERS, VARIANTS, Member
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_kasa import SpectralLinear, Statistics, average_cores, calibrate, hotswap_adapter

TARGETS = ["0", "2", "4"]
KASA = next(member for member in MEMBERS if member.name == "kasa")
CORE = next(member for member in MEMBERS if member.name == "svfit")
BANDED = next(member for member in MEMBERS if member.name == "svft")
ROTATION = next(member for member in MEMBERS if member.name == "spectral_adapter")
LEFT = "base_model.model.2.peft_kasa_learnt.left"


def saved(folder: Path, member: Member = KASA, **given: Any) -> str:
    model = get_peft_model(bases.stack(), member.config(**({"target_modules": TARGETS} | given)))
    bases.move(model)
    model.save_pretrained(str(folder))
    return str(folder)


def edit_config(folder: str, **fields: Any) -> None:
    path = os.path.join(folder, "adapter_config.json")
    with open(path) as file:
        held = json.load(file)
    with open(path, "w") as file:
        json.dump(held | fields, file)


def edit_weights(folder: str, edit: Callable[[dict[str, Tensor]], None]) -> None:
    path = os.path.join(folder, "adapter_model.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder: str, said: str, **given: Any) -> None:
    """Loading fails with these words, as the first adapter and as the second, and leaves the model as it was."""
    base = bases.stack()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        PeftModel.from_pretrained(base, folder, **given)
    assert not any(isinstance(module, SpectralLinear) for module in base.modules())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    model = get_peft_model(base, CORE.config(target_modules=TARGETS))
    if not given:
        with pytest.raises(ValueError, match=said):
            model.load_adapter(folder, "other")
        assert list(model.peft_config) == ["default"]


# Configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 10**12}, r"0: r has to be at most min\(out, in\) = min\(12, 24\).*Found 1000000000000"),
        ({"r": 1e12}, "adapter_config.json: r has to be int | None. Found 1000000000000.0"),
        ({"r": 0}, "r has to be a whole number of at least 1"),
        ({"r": "8"}, "adapter_config.json: r has to be"),
        ({"r": True}, "adapter_config.json: r has to be"),
        ({"r": [4]}, "adapter_config.json: r has to be"),
        ({"alpha": -1.0}, "alpha has to be a finite number above 0"),
        ({"alpha": float("nan")}, "adapter_config.json: alpha has to be float | None. Found nan"),
        ({"alpha": float("inf")}, "adapter_config.json: alpha has to be"),
        ({"alpha": 10**400}, "adapter_config.json: alpha has to be"),
        ({"alpha_pattern": {"0": float("inf")}}, "adapter_config.json: alpha_pattern has to be"),
        ({"dropout": "0.1"}, "adapter_config.json: dropout has to be float"),
        ({"dropout": 1.5}, "dropout has to be 0 <= dropout < 1"),
        ({"beta": float("nan")}, "adapter_config.json: beta has to be float"),
        ({"truncation": 10**12}, "0: truncation has to leave something"),
        ({"form": ["paper"]}, "adapter_config.json: form has to be"),
        ({"regularize": "no"}, "adapter_config.json: regularize has to be bool"),
        ({"seed": 0.5}, "adapter_config.json: seed has to be int"),
        ({"method": "../../kasa"}, "`method` has to be one of"),
        ({"method": ["kasa"]}, "`method` has to be one of"),
        ({"statistics": "/etc/passwd"}, "statistics are not read from a file's config"),
        ({"rank_pattern": ["0"]}, "adapter_config.json: rank_pattern has to be"),
        ({"rank_pattern": {"0": 10**12}}, "0: r has to be at most"),
        ({"rank_pattern": {f"x{i}": 1 for i in range(10**5)}}, "rank_pattern may have as many entries as the model"),
        ({"rank_pattern": {"(0+)+x": 2}}, "rank_pattern has a repeat or a choice inside a repeat"),
        ({"target_modules": "(.*a)*b"}, "target_modules has a repeat or a choice inside a repeat"),
        ({"exclude_modules": "([a-z]+)*$"}, "exclude_modules has a repeat or a choice inside a repeat"),
        ({"exclude_modules": "(.|.)*!"}, "exclude_modules has a repeat or a choice inside a repeat"),
        ({"exclude_modules": "(?:a?a?)*b"}, "exclude_modules has a repeat or a choice inside a repeat"),
        ({"target_modules": {"0": 1}}, "adapter_config.json: target_modules has to be"),
        ({"target_modules": ["../../../etc/passwd"]}, "not found in the base model"),
        ({"target_modules": [f"x{i}" for i in range(10**5)]}, "target_modules may have as many entries"),
        ({"rank_budget": 2.0}, "rank_budget has to be None"),
        ({"modules_to_save": 4}, "adapter_config.json: modules_to_save has to be"),
    ],
    ids=str,
)
def test_a_config_is_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    edit_config(folder, **fields)
    refused(folder, said)


@pytest.mark.parametrize("member", [*MEMBERS, *VARIANTS], ids=str)
def test_what_the_family_itself_writes_is_taken(member: Member, tmp_path: Path) -> None:
    given = {
        "rank_pattern": {r"^2$": 3},
        "alpha_pattern": {"0": 4},
        "alpha": 6,
        "exclude_modules": r".*\.(lm_head|score)",
        "task_type": "CAUSAL_LM",
    }
    config = member.config(**({"target_modules": r"(.*\.)?[024]{1}"} | given))
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"regularize": 0}, "KaSAConfig: regularize has to be bool. Found 0: give such a value"),
        ({"use_rslora": 0}, "KaSAConfig: use_rslora has to be bool"),
        ({"init_weights": 0}, "KaSAConfig: init_weights has to be bool"),
        ({"reference_truncation": 0}, "KaSAConfig: reference_truncation has to be bool"),
        ({"reference_truncation": "false"}, "KaSAConfig: reference_truncation has to be bool. Found 'false'"),
        ({"beta": "1e-4"}, "KaSAConfig: beta has to be float. Found '1e-4'"),
        ({"dropout": "0.1"}, "KaSAConfig: dropout has to be float"),
        ({"modules_to_save": "x"}, "KaSAConfig: modules_to_save has to be"),
        ({"rank_pattern": {"q": None}}, "KaSAConfig: rank_pattern has to be"),
        ({"target_modules": r"(\w+\.)*(0|2)"}, "KaSAConfig: target_modules has a repeat or a choice inside a repeat"),
    ],
    ids=str,
)
def test_what_could_not_be_loaded_again_is_refused_before_training(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KASA.config(**fields)


def test_all_ranks_are_loaded_again(tmp_path: Path) -> None:
    model = get_peft_model(bases.stack(), CORE.config(r=None, target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(bases.stack(), tmp_path).peft_config["default"].r is None


# Weights ----------------------------------------------------------------------------------------------------------


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors[LEFT][0, 0] = torch.inf


def whole_numbers(tensors: dict[str, Tensor]) -> None:
    tensors[LEFT] = tensors[LEFT].int()


def transposed(tensors: dict[str, Tensor]) -> None:
    tensors[LEFT] = tensors[LEFT].T.contiguous()


def no_dimensions(tensors: dict[str, Tensor]) -> None:
    tensors[LEFT] = torch.tensor(1.0)


def a_base_weight(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.2.base_layer.weight"] = torch.zeros(20, 12)


def a_path(tensors: dict[str, Tensor]) -> None:
    tensors["../../../tmp/x"] = torch.zeros(2)


def another_adapters(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.2.modules_to_save.someone.weight"] = torch.zeros(20, 12)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (infinite, "2: left .* NaN or infinite"),
        (whole_numbers, r"2: left has to be .*torch\.float32.*Found torch\.int32"),
        (transposed, r"2: left has to be of shape \(20, 4\). Found \(4, 20\)"),
        (no_dimensions, r"2: left has to be of shape \(20, 4\). Found \(\)"),
        (a_base_weight, "base_layer.weight: .* might overwrite the base"),
        (a_path, r"\.\./\.\./\.\./tmp/x: .* might overwrite the base"),
        (another_adapters, "modules_to_save.someone.weight: .* might overwrite the base"),
    ],
)
def test_weights_are_refused(edit: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    edit_weights(folder, edit)
    refused(folder, said)


def test_a_trained_module_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, target_modules=["0", "2"], modules_to_save=["4"])
    edit_weights(folder, lambda tensors: tensors.update({"base_model.model.4.weight": torch.zeros(20, 21)}))
    base = bases.stack()
    with pytest.raises(ValueError, match=r"4\.modules_to_save.*of shape \(20, 20\). Found \(20, 21\)"):
        PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize(
    ("member", "fixed", "said"),
    [(BANDED, 1e9, "fixed in the adapter's file gives no core"), (ROTATION, 3e38, "the core .* NaN or infinite")],
    ids=str,
)
def test_what_a_core_is_made_of_is_checked(member: Member, fixed: float, said: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, member, save_frames=True)

    def spoil(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if key.endswith((".fixed", "learnt.core")):
                tensors[key].fill_(fixed)

    edit_weights(folder, spoil)
    refused(folder, said)


def test_a_header_that_promises_more_than_there_is_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    size = 4 * 10**12
    header = json.dumps({LEFT: {"dtype": "F32", "shape": [10**12], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "adapter_model.safetensors"
    for data in (len(header).to_bytes(8, "little") + header, (2**62).to_bytes(8, "little") + header, b"", b"\x80\x04."):
        path.write_bytes(data)
        refused(folder, "is damaged or was cut short")


# Pickles ----------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("it-went-off",)


@pytest.fixture
def pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that has a pickle in the place of its weights, which leaves a mark when it is read."""
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    return folder


def test_a_pickle_is_never_read(pickled: str) -> None:
    said = "has its weights as a pickle .*adapter_model.bin.*loads adapter_model.safetensors alone"
    refused(pickled, said)
    refused(pickled, said, config=PeftConfig.from_pretrained(pickled))
    model = get_peft_model(bases.stack(), KASA.config(target_modules=TARGETS))
    with pytest.raises(ValueError, match=said):  # into an adapter that is there: no config is read
        model.load_adapter(pickled, "default")
    with pytest.raises(ValueError, match=said):
        hotswap_adapter(model, pickled)
    with pytest.raises(ValueError, match=said):
        average_cores([pickled], "mean")
    assert not os.path.exists("it-went-off")


def test_no_pickle_is_written(tmp_path: Path) -> None:
    model = get_peft_model(bases.stack(), KASA.config(target_modules=TARGETS))
    with pytest.raises(ValueError, match="safe_serialization has to be True"):
        model.save_pretrained(str(tmp_path), safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_peft_loads_and_saves_its_own_as_before(tmp_path: Path) -> None:
    model = get_peft_model(bases.stack(), LoraConfig(r=2, target_modules=TARGETS))
    model.save_pretrained(str(tmp_path), safe_serialization=False)
    assert "peft_kasa" not in (tmp_path / "README.md").read_text()
    again = PeftModel.from_pretrained(bases.stack(), str(tmp_path))
    again.load_adapter(str(tmp_path), "other")


# Averages and statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"alpha": float("nan")}, "alpha has to be"),
        ({"peft_type": "LORA"}, "peft_type has to be PEFT_KASA"),
        ({"method": "../x"}, "`method` has to be one of"),
        ({"statistics": "/etc/passwd"}, "statistics are not read"),
    ],
    ids=str,
)
def test_a_config_is_not_averaged(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", CORE)
    edit_config(folder, **fields)
    with pytest.raises(ValueError, match=said):
        average_cores([folder, folder], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_damaged_files_are_not_averaged(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", CORE)
    (tmp_path / "one" / "adapter_config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="has to hold an object"):
        average_cores([folder], tmp_path / "mean")
    folder = saved(tmp_path / "two", CORE)
    (tmp_path / "two" / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="is damaged or was cut short"):
        average_cores([folder], tmp_path / "mean")


def spoilt(path: str, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Rewrites a file of statistics with other tensors or metadata."""
    with safe_open(path, framework="pt") as file:
        held = file.metadata()
    save_file(load_file(path) | tensors, path, metadata=held | metadata)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"0.mean": torch.zeros(10**7, dtype=torch.float64)}, {}),  # 800 TB, if it were believed
        ({"0.scatter": torch.zeros(3, dtype=torch.float64)}, {}),
        ({"0.count": torch.zeros(2, dtype=torch.float64)}, {}),
        ({"0.mean": torch.full((24,), torch.nan, dtype=torch.float64)}, {}),
        ({}, {"modules": "[]"}),
        ({}, {"modules": '{"0": "../../x"}'}),
        ({}, {"targets": "7"}),
        ({}, {"seen": "many"}),
        ({}, {"kind": "../x"}),
        ({}, {"complete": "[" * 100_000}),
        ({"sketches": torch.zeros(1)}, {}),
    ],
)
def test_statistics_are_refused(tensors: dict[str, Tensor], metadata: dict[str, str], tmp_path: Path) -> None:
    eva = next(member for member in MEMBERS if member.name == "eva")
    path, config = str(tmp_path / "statistics.safetensors"), eva.config_class(r=2, target_modules=TARGETS)
    rows = [{"input": x} for x in torch.randn(4, 1, 8, 24, generator=torch.Generator().manual_seed(0))]
    calibrate(bases.Scored(*bases.stack()), rows, config, path=path)
    spoilt(path, tensors, **metadata)
    with pytest.raises(ValueError, match=r"statistics\.safetensors.*(again|another)"):
        [Statistics.load(path).evidence(name) for name in TARGETS]
    config = eva.config_class(r=2, target_modules=TARGETS, statistics=path)
    base = bases.stack()
    with pytest.raises(ValueError, match=r"statistics\.safetensors.*(again|another)"):
        get_peft_model(base, config)
    assert not any(isinstance(module, SpectralLinear) for module in base.modules())


def test_statistics_of_another_width_are_refused(tmp_path: Path) -> None:
    """Even where they are consistent in themselves, and their sketches those of the base."""
    eva = next(member for member in MEMBERS if member.name == "eva")
    path, config = str(tmp_path / "statistics.safetensors"), eva.config_class(r=2, target_modules=["0"])
    rows = [{"input": x} for x in torch.randn(4, 1, 8, 24, generator=torch.Generator().manual_seed(0))]
    calibrate(bases.Scored(*bases.stack()), rows, config, path=path)
    narrow = {"0.mean": torch.zeros(4, dtype=torch.float64), "0.scatter": torch.ones(10, dtype=torch.float64)}
    spoilt(path, narrow)
    with pytest.raises(ValueError, match=r"0: its statistics have to be of shape \(24,\). Found \(4,\)"):
        get_peft_model(bases.stack(), eva.config_class(r=2, target_modules=["0"], statistics=path))
