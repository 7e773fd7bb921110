"""What `peft-kasa` says of inputs that it cannot use: the file, the remedy, and no traceback."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from command_line import Done, call, make
from safetensors import SafetensorError

from peft_kasa.cli.models import located
from peft_kasa.cli.sft_arguments import AdapterArguments
from peft_kasa.cli.versions import versions
from peft_kasa.report.report import Report
from peft_kasa_cli.main import told
from peft_kasa_cli.parser import build

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def last(done: Done) -> str:
    assert "Traceback" not in done.err
    return done.err.splitlines()[-1]


# Files -----------------------------------------------------------------------------------------------------------

CONFIGS = {
    '{"peft_type": "FROBNICATE"}': "FROBNICATE",
    '{"r": 4}': "peft_type",
    "{broken": "cannot be read",
}


@pytest.mark.parametrize("text", CONFIGS)
@pytest.mark.parametrize("command", ["inspect", "export", "inspect --against"])
def test_a_config_that_cannot_be_read_is_named(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, command: str
) -> None:
    bad, kasa = tmp_path / "bad", str(made / "kasa")
    shutil.copytree(kasa, bad)
    (bad / "adapter_config.json").write_text(text)
    words = {
        "inspect": ("inspect", str(bad)),
        "export": ("export", str(bad), str(tmp_path / "x")),
        "inspect --against": ("inspect", kasa, "--against", str(bad)),
    }
    line = last(call(capfd, *words[command], code=1))
    assert CONFIGS[text] in line
    assert f"{bad}: adapter_config.json" in line
    assert "save it again" in line


def test_a_folder_of_adapters_names_them(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As save_pretrained leaves it where no adapter is called default."""
    for name in ("b", "a"):
        shutil.copytree(made / "kasa", tmp_path / name)
    for words in (("inspect", str(tmp_path)), ("export", str(tmp_path), str(tmp_path / "x"))):
        line = last(call(capfd, *words, code=1))
        assert f"{tmp_path} has no adapter_config.json" in line
        assert f"give one of {tmp_path / 'a'}, {tmp_path / 'b'}." in line


@pytest.mark.parametrize("content", ["{broken", '{"hidden_size": 4}', "[1]", "GGUF?"])
def test_a_base_that_cannot_be_read_is_named(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str
) -> None:
    name = "base.gguf" if content == "GGUF?" else "config.json"
    (tmp_path / name).write_text(content)
    bad = str(tmp_path / name if name == "base.gguf" else tmp_path)
    for words in (("spectrum", bad), ("methods", "--model", bad)):
        line = last(call(capfd, *words, code=1))
        assert f"{bad} cannot be loaded" in line
        assert "Copy it again" in line


def test_a_model_type_that_transformers_does_not_know(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "frobnicate"}')
    out, bad = str(tmp_path / "out"), str(tmp_path)
    sft = f"sft --model_name_or_path {bad} --dataset_name x --use_cpu --bf16 False --report_to none --output_dir {out}"
    adapter = (str(made / "kasa"), out, "--base", bad)
    decompose = ("decompose", bad, "--method", "pissa")
    for words in (("spectrum", bad), ("export", *adapter), ("merge", *adapter), decompose, sft.split()):
        line = last(call(capfd, *words, code=1))
        assert f"{bad}: config.json has model_type 'frobnicate', which transformers " in line
        assert line.endswith("Update it (pip install -U transformers), or give a model that it knows.")
    assert not Path(out).exists()


def test_a_base_that_only_the_adapter_names(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    """It was saved in another folder, by a relative path."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "kasa", "kasa")
    path = Path("kasa", "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "base"}))
    line = last(call(capfd, "export", "kasa", "x", code=1))
    assert "kasa names the base 'base'" in line
    assert "--base" in line


def test_a_name_that_is_nowhere(capfd: pytest.CaptureFixture[str], offline: None) -> None:
    for words in (("spectrum", "nobody/none"), ("inspect", "nobody/none"), ("export", "nobody/none", "x")):
        line = last(call(capfd, *words, code=1))
        assert line.startswith("peft-kasa: nobody/none is no folder here")
        assert (".gguf" in line) == (words[0] == "spectrum")  # adapters are not in such files


def test_a_model_in_the_cache_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    """Of the revision that is asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--some--one", "0" * 40
    for path, text in ((repo / "refs" / "v1", commit), (repo / "snapshots" / commit / "config.json", "{}")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert located("some/one", "v1") == ("some/one", {})
    with pytest.raises(ValueError, match="Hub cannot be reached"):
        located("some/one")


# Options ---------------------------------------------------------------------------------------------------------


def test_sft_where_no_gpu_has_bf16(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    words = ("sft", "--model_name_or_path", "/nowhere", "--dataset_name", "y", "--output_dir", "z")
    assert "Pass --use_cpu --bf16 False" in last(call(capfd, *words, code=1))
    assert "bf16" not in last(call(capfd, *words, "--use_cpu", code=1))


@pytest.mark.parametrize("device", ["frobnicate", "cuda:99", "meta"])
def test_a_device_that_is_not_here(capfd: pytest.CaptureFixture[str], device: str) -> None:
    """Known before the model is looked for."""
    words = ("decompose", "/nowhere", "--method", "pissa", "--device", device)
    assert f"--device has to be one that works here, see `peft-kasa doctor`. Found {device}" in last(
        call(capfd, *words, code=1)
    )


def test_an_option_is_not_overridden(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("decompose", str(made / "base"), "--method", "kasa", "--r", "4", "--set", "r=5")
    assert "have no option of their own. Found r." in last(call(capfd, *words, code=1))
    with pytest.raises(ValueError, match="Found dropout"):
        AdapterArguments(options=["dropout=0.1"]).config()


def test_nothing_to_decompose_is_said(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("decompose", str(made / "base"), "--method", "nlora", "--r", "4", "--cache", str(tmp_path))
    done = call(capfd, *words)
    assert "nothing to compute ahead" in done.out
    assert "Train with" not in done.out


def test_methods_that_a_rank_does_not_fit_have_no_count(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = call(capfd, "methods", "--model", str(made / "base"), "--r", "32", "--json")
    counts = {row["method"]: row["count"] for row in json.loads(done.out)}
    assert counts["kasa"] is None  # k_proj has 32 outputs, and as many triples would leave
    assert counts["pissa"] > 0


def test_merge_does_not_warn_of_the_dtype_that_was_asked_for(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = call(capfd, "merge", str(made / "kasa"), str(tmp_path / "x"), "--dtype", "float16")
    assert "not the one" not in done.err


def test_json_may_stand_before_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert json.loads(call(capfd, "--json", "methods").out) == json.loads(call(capfd, "methods", "--json").out)
    assert "Traceback" in call(capfd, "--debug", "sft", "--output_dir", "x", "--method", "none", code=1).err


def test_home_is_expanded(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(made / "kasa", tmp_path / "kasa")
    call(capfd, "export", "~/kasa", "~/x", f"--base={made / 'base'}")
    assert (tmp_path / "x" / "adapter_config.json").is_file()


def test_the_docs_name_every_option() -> None:
    text = (DOCS / "cli.md").read_text()
    commands = next(action for action in build()._actions if action.dest == "command").choices
    assert commands is not None
    found = {word for name in commands for word in commands[name]._option_string_actions}  # type: ignore[call-overload]
    found |= {f"--{name}" for name in AdapterArguments.__dataclass_fields__}
    assert not {word for word in found if word not in text} - {"-h"}


# Pages -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_drawn_is_known_first(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("peft_kasa.report.page", "peft_kasa.report.picture"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    for kind in ("html", "png"):
        line = last(call(capfd, "spectrum", "/nowhere", f"--{kind}", str(tmp_path / f"x.{kind}"), code=3))
        assert "peft_kasa[report]" in line


def test_the_result_is_shown_before_it_is_drawn(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    page = str(tmp_path / "x.html")
    told_of = json.loads(call(capfd, "inspect", str(made / "kasa"), "--html", page, "--json").out)
    assert told_of["pages"] == {"html": page}
    monkeypatch.setattr(Report, "to_html", full)
    done = call(capfd, "inspect", str(made / "kasa"), "--html", page, code=1)
    assert "Updates" in done.out
    assert "written:" not in done.out


# Packages and limits ---------------------------------------------------------------------------------------------


def test_rich_is_a_package_that_may_be_missing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("rich", "peft_kasa_cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert import_module("peft_kasa_cli").main(["methods"]) == 3
    assert "pip install rich" in last(Done(*capfd.readouterr()))


def test_doctor_says_that_rich_is_needed() -> None:
    assert [row["needed"] for row in versions() if row["package"] == "rich"] == [True]


def test_a_package_that_is_too_old_is_updated() -> None:
    code, line = told(ImportError("cannot import name 'X' from 'trl'", name="trl"))
    assert code == 3
    assert line.endswith("pip install -U trl")


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("No space left on device"),
        torch.OutOfMemoryError("2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOSPC, "No space left on device", "x"),
    ],
)
def test_limits_of_the_machine_were_foreseen(error: BaseException) -> None:
    code, line = told(error)
    assert code == 1
    assert "foreseen" not in line
    assert line.endswith(".")
