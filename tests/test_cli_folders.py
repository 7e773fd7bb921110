"""What `peft-kasa` never overwrites, and how it replaces what it may."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from command_line import call, make
from trl import DatasetMixtureConfig, ScriptArguments

from peft_kasa.cli.folders import check_training, whole_folder
from peft_kasa.cli.sft_parts import rows
from peft_kasa.files import replacing

SFT = "sft --model_name_or_path base --dataset_name train.jsonl --use_cpu --output_dir"
REFUSED: list[tuple[str, str]] = [
    ("export kasa . --overwrite", "holds what would be read"),
    ("export ../w/kasa ../w --base ../w/base --overwrite", "holds what would be read"),
    ("export kasa kasa/../kasa --overwrite", "is what would be read"),
    ("merge kasa base --overwrite", "is what would be read"),
    ("merge kasa ../w/base --overwrite", "is what would be read"),
    ("convert lora pissa --initial pissa --overwrite", "is what would be read"),
    ("export kasa photos --overwrite", "holds neither an adapter nor a model"),
    ("export kasa kept --overwrite", "holds neither an adapter nor a model"),
    ("export kasa lora", "is there already"),
    ("export kasa train.jsonl/x", "train.jsonl/x cannot be written"),
    ("spectrum base --html base/model.safetensors", "--html has to be the name of a .html file"),
    ("inspect kasa --png kasa/adapter_model.safetensors", "--png has to be the name of a .png file"),
    ("spectrum nowhere --html train.jsonl/x.html", "train.jsonl/x.html cannot be written"),
    (f"{SFT} base", "is what would be read"),
    (f"{SFT} base --overwrite", "is what would be read"),
    (f"{SFT} kasa", "--overwrite"),
    (f"{SFT} kept", "--resume_from_checkpoint"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def work(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose adapters name their base as it is called there. It looks like an adapter itself."""
    work = tmp_path_factory.mktemp("apart") / "w"
    shutil.copytree(made, work)
    for path in work.glob("*/adapter_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "base"}))
    shutil.copy(work / "kasa" / "adapter_config.json", work)
    (work / "photos").mkdir()
    (work / "photos" / "config.json").write_text("of a camera")
    (work / "kept" / "checkpoint-1").mkdir(parents=True)
    return work


def held(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["out [x]y", "out [", "out :x:"])
def test_a_name_is_shown_as_it_is(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(work)
    folder = str(tmp_path / name)
    assert call(capfd, "export", "kasa", folder).out.startswith(f"{folder}: ")
    assert (tmp_path / name / "adapter_config.json").is_file()


@pytest.mark.parametrize("name", ["runs [1] é", "[a]*?"])
def test_data_may_lie_where_a_pattern_seems_to_be(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "rows [x].jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path / name)
    for file in ("rows [x].jsonl", str(tmp_path / name / "rows [x].jsonl")):
        train, _ = rows(ScriptArguments(dataset_name=file), DatasetMixtureConfig(), False)
        assert train["text"][:] == ["a"]


def test_a_name_that_seems_to_close_a_style(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(work)
    folder = str(tmp_path / "runs [" / "x]")
    assert f"added to {folder}" in call(capfd, "decompose", "base", "--method", "kasa", "--cache", folder).out


@pytest.mark.parametrize(("line", "told"), REFUSED)
def test_nothing_is_lost(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, told: str
) -> None:
    monkeypatch.chdir(work)
    before = held(work)
    done = call(capfd, *line.split(), code=1)
    assert told in done.err.splitlines()[-1]
    assert held(work) == before


def test_the_folder_that_one_works_in_is_kept(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work / "lora")
    before = held(work)
    done = call(capfd, "export", "../kasa", ".", "--base", "../base", "--overwrite", code=1)
    assert "is the folder that you work in" in done.err
    assert held(work) == before


def test_overwrite_replaces_an_adapter_as_a_whole(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    shutil.copytree("lora", "old")
    Path("old", "more").write_text("of it")
    call(capfd, "export", "kasa", "old", "--overwrite")
    assert json.loads(Path("old", "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert not Path("old", "more").exists()


def test_a_link_stays_one(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    (target / "adapter_config.json").write_text("old")
    link.symlink_to(target)
    with whole_folder(str(link), True) as folder:
        Path(folder, "adapter_config.json").write_text("new")
    assert link.is_symlink()
    assert (target / "adapter_config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], step: int
) -> None:
    old, rename, renames = tmp_path / "old", os.replace, []
    old.mkdir()
    (old / "kept").write_text("kept")

    def failing(source: str, target: str) -> None:
        renames.append(source)
        if len(renames) == step:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(error), replacing(old) as folder:
        Path(folder, "old").mkdir()
    assert (old / "kept").read_text() == "kept"
    assert list(tmp_path.iterdir()) == [old]


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(OSError, match="old"), replacing(tmp_path / "old") as folder:
        Path(folder, "old").write_text("a file")
    assert (tmp_path / "old").is_dir()


def test_a_training_goes_on_where_that_was_asked_for(work: Path) -> None:
    for name in ("kasa", "kept"):
        check_training(str(work / name), str(work / "base"), True)
    check_training(str(work / "photos"), str(work / "base"), False)  # nothing of it is touched


def test_sft_asks_where_to_write(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--use_cpu", "--model_name_or_path", str(tmp_path), "--dataset_name", "x")
    assert "--output_dir" in call(capfd, "sft", *words, code=2).err
    (tmp_path / "run.yaml").write_text("output_dir: here\n")
    assert "has no config.json" in call(capfd, "sft", "--config", str(tmp_path / "run.yaml"), *words, code=1).err
