"""Real processes of `peft-kasa` on a machine that is too small, or where a place is not what it should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import make
from forked import Ended, Server
from test_cli_folders import held
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 2**20
SFT = "sft --model_name_or_path base --dataset_name train.jsonl --use_cpu --bf16 False --report_to none --max_steps 1"
WRITERS = [
    "export kasa out --base base",
    "merge kasa out --base base",
    "convert lora out --base base",
    "spectrum base --target-modules 0.self_attn.q_proj --html out.html",
    "inspect kasa --png out.png",
    "decompose base --method pissa --cache out",
    f"{SFT} --output_dir out --save_strategy no",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = make(tmp_path_factory.mktemp("limits") / "work")
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 16384, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(torch.bfloat16).save_pretrained(work / "wide")
    return work


def last(ended: Ended) -> str:
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err
    return ended.err.splitlines()[-1]


@pytest.mark.parametrize("words", WRITERS)
def test_where_there_is_no_space_nothing_is_left(forks: Server, work: Path, words: str) -> None:
    before = held(work)
    line = last(forks.run(work, words, file=2048))
    assert "There is too little space" in line
    assert "name another place" in line
    assert held(work) == before
    assert not list(work.rglob(".*"))
    shutil.rmtree(work / "out", ignore_errors=True)  # empty: of the cache, or of the training


def test_what_fits_of_a_cache_is_kept_and_what_does_not_is_said(forks: Server, work: Path) -> None:
    """The value projections' triples are fewer numbers than the queries'."""
    words = "decompose base --method pissa --r 8 --target-modules q_proj v_proj --json --cache"
    assert forks.run(work, f"{words} all").code == 0
    sizes = sorted(path.stat().st_size for path in (work / "all").iterdir())
    assert len(sizes) == 4
    line = last(forks.run(work, f"{words} some", file=(sizes[0] + sizes[-1]) // 2))
    assert "after 2 of the decompositions; run again, it goes on from there" in line
    assert "There is too little space" in line
    told = json.loads(forks.run(work, f"{words} some").out)
    assert (told["decompositions"], told["computed"], told["reused"]) == (4, 2, 2)


def test_too_little_memory_names_the_weight(forks: Server, work: Path) -> None:
    """The file of the weights fits, their double precision does not."""
    words = "decompose wide --method svf --target-modules down_proj --cache cache"
    line = last(forks.run(work, words, memory=180 * MIB))
    assert "model.layers.0.mlp.down_proj (512 x 16384): there is too little memory on cpu" in line
    assert line.endswith("or leave the module out of target_modules.")


@pytest.mark.parametrize("words", ["spectrum wide", "decompose wide --method pissa", "merge kasa out --base wide"])
def test_too_little_memory_to_load(forks: Server, work: Path, words: str) -> None:
    before = held(work)
    line = last(forks.run(work, words, memory=20 * MIB))
    assert "needs more memory" in line
    assert "--dtype" in line
    assert held(work) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("decompose base --method pissa --cache train.jsonl", "train.jsonl cannot be written"),
        (f"{SFT} --output_dir train.jsonl", "train.jsonl is a file. Name a folder."),
        ("export kasa train.jsonl --base base", "train.jsonl is a file. Name a folder."),
    ],
)
def test_a_file_is_no_folder(forks: Server, work: Path, words: str, told: str) -> None:
    ended = forks.run(work, words)
    assert told in last(ended)
    assert "loading" not in ended.err.lower()  # known before any work
