"""`peft-kasa`: commands, errors and exit codes, in this process where that is enough, in real ones where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bases
import pytest
import torch
from command_line import FILES, Done, call, make
from peft import PeftModel, get_peft_model
from peft.utils import load_peft_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

import peft_kasa
from peft_kasa.methods import methods
from peft_kasa.spectral.cache import entries

Run = Callable[..., Done]


class Works(NamedTuple):
    """A folder with a base, adapters and data, and a way to run a command there."""

    folder: Path
    run: Run

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def base(self) -> PreTrainedModel:
        return bases.load(self.path("base"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def works(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Works:
    monkeypatch.setenv("PEFT_KASA_CACHE", str(folder / "default-cache"))
    return Works(folder, lambda *words, code=0: call(capfd, *words, code=code))


# Commands -------------------------------------------------------------------------------------------------------


def test_methods_lists_the_family(works: Works) -> None:
    done = works.run("methods", "--json", "--model", works.path("base"), "--r", "4")
    rows = {row["method"]: row for row in json.loads(done.out)}
    assert rows.keys() == methods().keys()
    for name in ("kasa", "pissa", "lora_xs", "svft"):
        model = get_peft_model(works.base(), methods()[name](r=4, target_modules="all-linear"))
        assert rows[name]["count"] == sum(p.numel() for p in bases.learning(model))
    assert "lora_xs" in works.run("methods").out


def test_methods_tells_of_one(works: Works) -> None:
    told = json.loads(works.run("methods", "LoRA-XS", "--json").out)
    assert (told["method"], told["paper"]) == ("lora_xs", "arXiv:2405.17604")
    arguments = {row["name"]: row for row in told["arguments"]}
    assert list(arguments)[:2] == ["sigma", "std"]
    assert arguments["std"]["default"] == 1e-5
    assert "0: exactly the base model" in arguments["std"]["what"]
    assert all(row["what"] for row in arguments.values())


def test_every_method_is_told_of(works: Works) -> None:
    for name in methods():
        assert json.loads(works.run("methods", name, "--json").out)["arguments"]


def test_spectrum_is_what_lapack_finds(works: Works) -> None:
    done = works.run("spectrum", works.path("base"), "--json", "--ranks", "4", "--target-modules", "q_proj")
    weights = dict(works.base().named_modules())
    modules = json.loads(done.out)["modules"]
    assert len(modules) == 2
    for row in modules:
        exact = torch.linalg.svdvals(weights[row["module"]].weight.detach().double())
        assert torch.tensor(row["values"], dtype=torch.float64) == pytest.approx(exact, rel=1e-5, abs=1e-5)
    assert "effective rank" in works.run("spectrum", works.path("base"), "--target-modules", "q_proj").out


def test_inspect_tells_what_an_adapter_is(works: Works, tmp_path: Path) -> None:
    given = ("inspect", works.path("kasa"), "--base", works.path("base"), "--against", works.path("lora"))
    told = json.loads(works.run(*given, "--json").out)
    assert (told["method"], len(told["modules"])) == ("kasa", 14)
    assert {row["rank"] for row in told["modules"]} == {4}
    assert all(row["relative_norm"] > 0 for row in told["modules"])
    pages = [str(tmp_path / name) for name in ("report.html", "report.png")]
    shown = works.run(*given, "--html", pages[0], "--png", pages[1]).out
    assert all(f"written: {page}" in shown and Path(page).stat().st_size > 1000 for page in pages)
    assert "Beside the base's weights" in shown
    assert "Beside the updates of" in shown


def test_export_gives_the_same_logits_without_the_package(works: Works) -> None:
    told = json.loads(works.run("export", works.path("kasa"), works.path("exported"), "--json").out)
    assert (told["rank"], told["modules"]) == (8, 14)
    config = json.loads((works.folder / "exported" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert same(works, "kasa", "exported") < 1e-5


def test_export_cuts_to_a_rank_and_says_what_that_loses(works: Works) -> None:
    told = json.loads(works.run("export", works.path("kasa"), works.path("cut"), "--rank", "2", "--json").out)
    assert told["rank"] == 2
    assert max(told["errors"].values()) > 0.1
    again = works.run("export", works.path("kasa"), works.path("cut"), "--rank", "3", "--overwrite")
    assert "What the cut loses most of" in again.out
    assert {value.shape[0] for key, value in load_peft_weights(works.path("cut")).items() if "lora_A" in key} == {3}


def test_merge_gives_the_same_logits(works: Works) -> None:
    told = json.loads(works.run("merge", works.path("kasa"), works.path("merged"), "--json").out)
    assert (told["modules"], told["dtype"], told["tokenizer"]) == (14, "float32", True)
    merged = AutoModelForCausalLM.from_pretrained(works.path("merged"))
    adapted = PeftModel.from_pretrained(works.base(), works.path("kasa"))
    assert (bases.logits(merged) - bases.logits(adapted)).abs().max() < 1e-5
    assert (works.folder / "merged" / "tokenizer.json").is_file()


def test_merge_says_what_rounding_loses(works: Works) -> None:
    done = works.run("merge", works.path("kasa"), works.path("merged16"), "--dtype", "bfloat16", "--json")
    told = json.loads(done.out)
    assert told["dtype"] == "bfloat16"
    assert 1e-4 < told["rounding"] < 0.5
    assert all(line.startswith("peft-kasa: warning: ") for line in done.err.splitlines() if "Merged into" in line)


@pytest.mark.parametrize("name", ["lora", "pissa"])
def test_convert_keeps_the_update(works: Works, name: str) -> None:
    told = json.loads(works.run("convert", works.path(name), works.path(f"{name}-ours"), "--json").out)
    assert told["method"] == {"lora": "eva", "pissa": "pissa"}[name]
    assert same(works, name, f"{name}-ours") < 1e-5


def same(works: Works, one: str, other: str) -> float:
    """The largest difference of the logits of two adapters on the base."""
    found = [bases.logits(PeftModel.from_pretrained(works.base(), works.path(name))) for name in (one, other)]
    assert (found[0] - bases.logits(works.base())).abs().max() > 1e-2
    return (found[0] - found[1]).abs().max().item()


def test_decompose_fills_the_cache_that_training_reads(
    works: Works, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = ("decompose", works.path("base"), "--method", "pissa", "--r", "3", "--cache", str(tmp_path), "--json")
    told = json.loads(works.run(*given).out)
    assert (told["decompositions"], told["computed"], told["reused"]) == (14, 14, 0)
    first = {entry.key: entry.created for entry in entries(tmp_path)}
    assert len(first) == 14
    told = json.loads(works.run(*given).out)
    assert (told["computed"], told["reused"]) == (0, 14)
    monkeypatch.setenv("PEFT_KASA_CACHE", str(tmp_path))
    get_peft_model(works.base(), peft_kasa.PiSSAConfig(r=3, target_modules="all-linear"))
    assert {entry.key: entry.created for entry in entries(tmp_path)} == first


def test_decompose_takes_further_arguments(works: Works, tmp_path: Path) -> None:
    given = ("--method", "kasa", "--r", "3", "--set", "truncation=5", "--target-modules", "q_proj")
    told = json.loads(works.run("decompose", works.path("base"), *given, "--cache", str(tmp_path), "--json").out)
    assert told["decompositions"] == 2
    assert {(entry.k, entry.end) for entry in entries(tmp_path)} == {(5, "bottom")}


def test_doctor_finds_this_environment_sound(works: Works) -> None:
    done = works.run("doctor", "--json")
    told = json.loads(done.out)
    assert told["broken"] == []
    states = {row["check"]: row["state"] for row in told["checks"]}
    assert states["plug-in"] == states["bitsandbytes 4-bit"] == states["bitsandbytes 8-bit"] == states["trl"] == "ok"


def test_doctor_says_what_is_broken(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_kasa.cli import checks, doctor

    def broken() -> str:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(doctor, "CHECKS", [checks.Check("a", True, broken), checks.Check("b", False, broken)])
    done = works.run("doctor", "--json", code=3)
    assert json.loads(done.out)["broken"] == ["a"]


# Errors ---------------------------------------------------------------------------------------------------------

NO_METHOD = "The method has to be one of"
BAD: list[tuple[str, str]] = [  # {...} is a path in the folder
    ("spectrum {nowhere}", "there is no such folder"),
    ("spectrum {nowhere.gguf}", "there is no such file"),
    ("spectrum {kasa}", "has no config.json"),
    ("spectrum {train.jsonl}", "is a file"),
    ("spectrum {base} --ranks 0", "at least 1"),
    ("inspect {base}", "has no adapter_config.json"),
    ("inspect {nowhere}", "there is no such folder. Give a folder, or a Hub id"),
    ("inspect {kasa} --base {nowhere}", "there is no such folder. Give a folder or a .gguf file, or a Hub id"),
    ("export {lora} {x}", "peft-kasa convert"),
    ("export {kasa} {lora}", "is there already"),
    ("export {kasa} {base} --overwrite", "is what would be read"),
    ("export {kasa} {kasa} --overwrite", "is what would be read"),
    ("export {kasa} {train.jsonl}", "is a file"),
    ("export {kasa} {x} --rank 0", "rank has to be at least 1"),
    ("merge {nobody} {x}", "there is no such folder"),
    ("merge {cut-short} {x}", "is damaged or was cut short"),
    ("convert {kasa} {x}", "has to be a LoRA"),
    ("convert {dora} {x}", "use_dora has to be False"),
    ("convert {niter} {x}", "pissa_niter_4"),
    ("convert {lora} {x} --initial {lora}", "initial has to be None"),
    ("decompose {base} --method kassa", "Did you mean 'kasa'?"),
    ("decompose {base} --method kasa --set trunc=3", "Did you mean 'truncation'?"),
    ("decompose {base} --method kasa --set truncation=many", "truncation has to be int"),
    ("decompose {base} --method kasa --set truncation", "has to be NAME=VALUE"),
    ("decompose {base} --method corda", "starts from scaled inputs of data"),
    ("decompose {base} --method pissa --r 65", "r has to be at most"),
    ("methods lora", NO_METHOD),
    (
        "sft --model_name_or_path {nowhere} --dataset_name {train.jsonl} --output_dir {x} --use_cpu",
        "there is no such folder",
    ),
    ("sft --model_name_or_path {base} --dataset_name {no.jsonl} --output_dir {x} --use_cpu", "there is no such file"),
    (
        "sft --model_name_or_path {base} --dataset_name {train.jsonl} --output_dir {x} --use_cpu --method lora",
        NO_METHOD,
    ),
    (
        "sft --model_name_or_path {base} --dataset_name {train.jsonl} --output_dir {x} --use_cpu --lora_r 4",
        "--lora_r is of TRL's LoRA",
    ),
]


@pytest.mark.parametrize(("line", "told"), BAD)
def test_a_bad_input_is_one_line_and_1(works: Works, line: str, told: str) -> None:
    before = sorted(works.folder.iterdir())
    words = [works.path(word[1:-1]) if word.startswith("{") else word for word in line.split()]
    done = works.run(*words, code=1)
    last = done.err.splitlines()[-1]
    assert last.startswith("peft-kasa: ")
    assert told in last
    assert "Traceback" not in done.err
    assert not done.out
    assert sorted(works.folder.iterdir()) == before


@pytest.mark.parametrize(
    "line",
    [
        "",
        "frobnicate",
        "export one",
        "merge a b --dtype int8",
        "sft --output_dir x --use_cpu --frobnicate 3",
        "sft --use_cpu",
    ],
)
def test_a_bad_command_line_is_2(works: Works, line: str) -> None:
    done = works.run(*line.split(), code=2)
    assert done.err
    assert not done.out


def test_debug_shows_where(works: Works) -> None:
    assert "Traceback" in works.run("methods", "none", "--debug", code=1).err


def test_a_missing_package_is_3(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "trl", None)
    for name in [name for name in sys.modules if name.startswith("peft_kasa.cli.sft")]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install trl" in works.run("sft", code=3).err


def test_what_nobody_foresaw_is_4(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("peft_kasa.cli.methods.run", broken)
    assert "ZeroDivisionError: division by zero" in works.run("methods", code=4).err


@pytest.mark.parametrize("command", ["export kasa", "merge kasa", "convert lora"])
def test_an_interrupted_write_leaves_what_was_there(
    works: Works, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both where nothing was and where something is replaced."""

    def half(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for owner in (PreTrainedModel, PeftModel, peft_kasa.sharing.export.LoraConfig):
        monkeypatch.setattr(owner, "save_pretrained", half)
    name, adapter = command.split()
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_text("kept")
    for out in ("new", "old"):
        done = works.run(name, works.path(adapter), str(tmp_path / out), "--overwrite", code=130)
        assert done.err.splitlines()[-1] == "peft-kasa: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert [path.read_text() for path in old.iterdir()] == ["kept"]


def test_the_folder_is_as_it_was_made(works: Works) -> None:
    """Nothing wrote into its inputs."""
    for name, held in FILES.items():
        assert {path.name for path in (works.folder / name).iterdir()} >= held
