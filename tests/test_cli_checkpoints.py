"""Ctrl-C during `peft-kasa sft`: real processes, whose checkpoints and results are whole, and which go on from them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from command_line import make
from forked import Ended, Server
from test_cli_folders import held
from test_cli_interrupts import INT, TERM, check_end

WHOLE = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
WHOLE |= {"README.md", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "training_args.bin"}
RESULT = ("adapter_model.safetensors", "adapter_config.json")
SFT = "sft --model_name_or_path base --dataset_name train.jsonl --use_cpu --bf16 False --report_to none --max_steps 3"
SFT += " --learning_rate 1e-2 --per_device_train_batch_size 2 --method pissa --r 4 --target_modules q_proj v_proj"
SECOND = "open out/checkpoint-2/.saving."  # in the middle of the second checkpoint
FINISHING = "peft-kasa: finishing the files that are being written; once more, and they are dropped"


@pytest.fixture(scope="module")
def made(forks: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result of a training that nothing interrupted."""
    made = make(tmp_path_factory.mktemp("sft") / "made")
    ended = train(forks, made, "unbroken")
    assert ended.code == 0, ended.err
    return made


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "work"))


def train(forks: Server, work: Path, out: str, more: str = "--save_steps 1", **given: object) -> Ended:
    return forks.run(work, f"{SFT} --output_dir {out} {more}", **given)


def checkpoints(out: Path) -> list[str]:
    """The names of the checkpoints, which are all whole, in a folder without anything temporary."""
    assert not list(out.rglob(".*"))
    found = sorted(out.glob("checkpoint-*"))
    for checkpoint in found:
        assert set(os.listdir(checkpoint)) >= WHOLE, checkpoint
    return [checkpoint.name for checkpoint in found]


def check_goes_on(forks: Server, work: Path) -> None:
    """From the last checkpoint to the result of a training that nothing interrupted, bit for bit."""
    last = checkpoints(work / "out")[-1]
    ended = train(forks, work, "out", f"--save_steps 1 --resume_from_checkpoint out/{last}")
    assert ended.code == 0, ended.err
    assert [result(work / "out", name) for name in RESULT] == [result(work / "unbroken", name) for name in RESULT]


def result(out: Path, name: str) -> bytes:
    return (out / name).read_bytes()


@pytest.mark.parametrize("number", [INT, TERM])
def test_a_checkpoint_is_finished_first(forks: Server, work: Path, number: int) -> None:
    ended = train(forks, work, "out", at=SECOND, signals=[number])
    check_end(ended, number)
    assert FINISHING in ended.err
    assert checkpoints(work / "out") == ["checkpoint-1", "checkpoint-2"]
    check_goes_on(forks, work)


def test_a_second_ctrl_c_drops_the_checkpoint(forks: Server, work: Path) -> None:
    ended = train(forks, work, "out", at=SECOND, signals=[INT, INT])
    check_end(ended, INT)
    assert checkpoints(work / "out") == ["checkpoint-1"]
    check_goes_on(forks, work)


def test_a_checkpoint_that_does_not_fit_is_dropped(forks: Server, work: Path) -> None:
    """The adapter's own file does, Adam's state does not."""
    checkpoint = work / "unbroken" / "checkpoint-1"
    room = (checkpoint / "adapter_model.safetensors").stat().st_size + 1024
    assert room < (checkpoint / "optimizer.pt").stat().st_size
    ended = train(forks, work, "out", file=room)
    assert ended.code == 1
    assert "too little space" in ended.err.splitlines()[-1]
    assert checkpoints(work / "out") == []


def test_old_checkpoints_go_as_they_should(forks: Server, work: Path) -> None:
    ended = train(forks, work, "out", "--save_steps 1 --save_total_limit 1", at=SECOND)
    check_end(ended, INT)
    assert checkpoints(work / "out") == ["checkpoint-2"]


def test_between_checkpoints_it_ends_at_once(forks: Server, work: Path) -> None:
    ended = train(forks, work, "out", at="os.mkdir out")
    check_end(ended, INT)
    assert FINISHING not in ended.err
    assert checkpoints(work / "out") == []


def test_the_result_is_finished_first(forks: Server, work: Path) -> None:
    again = "--save_strategy no --overwrite --learning_rate 1e-3"
    before = held(work / "unbroken")
    ended = train(forks, work, "unbroken", again, at="/tokenizer_config.json", signals=[INT, INT])
    check_end(ended, INT)
    assert held(work / "unbroken") == before
    ended = train(forks, work, "unbroken", again, at="open unbroken/.saving.")
    check_end(ended, INT)
    assert checkpoints(work / "unbroken") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    after = held(work / "unbroken")
    assert train(forks, work, "new", "--save_strategy no --learning_rate 1e-3").code == 0
    assert all(result(work / "unbroken", name) == result(work / "new", name) for name in RESULT)
    assert before.keys() == after.keys()
