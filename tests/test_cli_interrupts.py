"""Ctrl-C and SIGTERM come to real processes of `peft-kasa` while they write."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from command_line import make
from forked import Ended, Server
from test_cli_folders import held

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("interrupts")]

INT, TERM = signal.SIGINT, signal.SIGTERM
ENDS = {INT: (130, "peft-kasa: interrupted"), TERM: (143, "peft-kasa: terminated")}
CHECKS = 4  # events before the work: whether there is a place to write, asked twice
MOMENTS = [  # a command that writes a new folder, and what it is about to do when the signal comes
    ("merge kasa out --base base", "open .out.", INT),
    ("merge kasa out --base base", "tokenizer_config.json", TERM),
    ("merge kasa out --base base", "os.rename .out.", INT),
    ("convert lora out --base base", "README.md", INT),
    ("convert lora out --base base", "os.rename .out.", TERM),
    ("export kasa out --base base", "open .out.", TERM),
]
PAGES = [
    ("spectrum base --target-modules 0.self_attn.q_proj --html out", "open .out."),
    ("spectrum base --target-modules 0.self_attn.q_proj --png out", "os.rename .out."),
    ("inspect kasa --html out", "os.rename .out."),
]


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    work = tmp_path / "work"
    shutil.copytree(made, work)
    return work


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cli"))


def check_end(ended: Ended, number: signal.Signals) -> None:
    code, line = ENDS[number]
    assert ended.code == code, ended.err
    assert ended.err.splitlines()[-1] == line
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(("words", "moment", "number"), MOMENTS)
def test_no_folder_is_left_that_is_not_whole(
    forks: Server, work: Path, words: str, moment: str, number: signal.Signals
) -> None:
    before = held(work)
    ended = forks.run(work, words, at=moment, signals=[number])
    check_end(ended, number)
    assert any(moment in event for event in ended.events)
    assert held(work) == before
    assert not [path for path in work.iterdir() if path.name.startswith(".") or path.name == "out"]


@pytest.mark.parametrize(("words", "moment"), PAGES)
def test_an_older_page_stays(forks: Server, work: Path, words: str, moment: str) -> None:
    kind = ".png" if "--png" in words else ".html"
    (work / f"out{kind}").write_text("older")
    names = sorted(path.name for path in work.iterdir())
    ended = forks.run(work, f"{words}{kind}", at=moment)
    check_end(ended, INT)
    assert (work / f"out{kind}").read_text() == "older"
    assert sorted(path.name for path in work.iterdir()) == names
    assert "module" in ended.out  # the result was shown


def test_at_every_file_there_is_the_old_folder_or_the_new_one(forks: Server, work: Path) -> None:
    """Also while the old one is put aside and removed, and while what is temporary is."""
    shutil.copytree(work / "lora", work / "older")
    names = sorted(path.name for path in work.iterdir())
    older = held(work / "older")
    events = len(run_over(forks, work).events)
    newer = held(work / "out")
    found = []
    for number in range(CHECKS, events):
        ended = run_over(forks, work, at=number)
        check_end(ended, INT)
        found.append(held(work / "out"))
        assert found[-1] in ({path.replace("older", "out"): data for path, data in older.items()}, newer), ended.events
        shutil.rmtree(work / "out")
        assert sorted(path.name for path in work.iterdir()) == names
    assert newer in found
    assert found[0] != newer


def run_over(forks: Server, work: Path, **given: int) -> Ended:
    """Exports over an older adapter."""
    shutil.rmtree(work / "out", ignore_errors=True)
    shutil.copytree(work / "older", work / "out")
    return forks.run(work, "export kasa out --base base --overwrite", **given)
