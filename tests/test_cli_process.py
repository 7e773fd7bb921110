"""`peft-kasa` as users start it: processes, a terminal, Ctrl-C."""

from __future__ import annotations

import fcntl
import json
import os
import pkgutil
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import bases
import pytest
import torch
from command_line import call, make
from launch import PATHS
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import peft_kasa.cli
from peft_kasa.spectral.cache import entries
from peft_kasa_cli import main

COMMAND = [sys.executable, "-m", "peft_kasa_cli"]
PATIENCE = 300
SHORT = "--use_cpu --bf16 False --report_to none --save_strategy no"  # for TRL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cli"))


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    path = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PEFT_KASA_CACHE": "0"} | more


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)


def test_help_comes_without_torch() -> None:
    code = """
import sys
from peft_kasa_cli import main
codes = [main(words) for words in (["--help"], ["--version"], ["merge", "--help"], ["merge"], ["export", "a"])]
assert not {"torch", "peft", "transformers"} & sys.modules.keys(), sys.modules.keys()
sys.exit(0 if codes == [0, 0, 0, 2, 2] else str(codes))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "exit codes: 0 done" in done.stdout
    for name in ("methods", "spectrum", "inspect", "export", "merge", "convert", "decompose", "sft", "doctor"):
        assert name in done.stdout


def test_the_script_is_the_command() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    target = text.split('peft-kasa = "')[1].split('"')[0]
    assert pkgutil.resolve_name(target) is main is peft_kasa.cli.main


def test_sft_trains_and_prints_nothing_but_json(folder: Path) -> None:
    """TRL prints its logs to standard output: they have to go elsewhere."""
    words = f"""
        --model_name_or_path base --dataset_name train.jsonl --output_dir out {SHORT}
        --max_steps 3 --logging_steps 1 --learning_rate 1e-2
        --method kasa --r 4 --options truncation=2 form=paper --target_modules q_proj v_proj
    """
    done = subprocess.run(
        [*COMMAND, "sft", "--json", *words.split()],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["method"], told["steps"], told["path"]) == ("kasa", 3, "out")
    assert told["last_loss"] < told["first_loss"]
    model = PeftModel.from_pretrained(bases.load(str(folder / "base")), str(folder / "out"))
    config = model.peft_config["default"]
    assert (config.r, config.truncation, config.form) == (4, 2, "paper")
    assert config.target_modules == {"q_proj", "v_proj"}
    assert told["learns"] == 2 * 4 * (64 + 64 + 1 + 64 + 32 + 1)


@pytest.mark.real
def test_sft_trains_in_two_processes_as_the_page_says(folder: Path) -> None:
    words = f"""
        --nproc-per-node 2 -m -- peft_kasa_cli sft --json
        --model_name_or_path base --dataset_name train.jsonl --output_dir two {SHORT}
        --per_device_train_batch_size 2 --max_steps 3 --logging_steps 1 --learning_rate 1e-2 --r 4
    """
    command = [sys.executable, "-m", "torch.distributed.run", *words.split()]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # the first process alone tells
    assert told["last_loss"] < told["first_loss"]
    assert re.findall(r"'epoch': '([\d.]+)'}$", done.stderr, re.M)[-1] == "0.75"  # 3 steps of 2 x 2 rows, of 16
    assert (
        PeftModel.from_pretrained(bases.load(str(folder / "base")), str(folder / "two")).peft_config["default"].r == 4
    )


def test_sft_calibrates_what_starts_from_data(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, data, out = (str(folder / name) for name in ("base", "train.jsonl", "corda"))
    words = f"sft --model_name_or_path {base} --dataset_name {data} --output_dir {out} --method corda --r 2"
    words += f" --statistics {folder / 'statistics.safetensors'} --calibration_samples 6 --max_steps 1 --json {SHORT}"
    told = call(capfd, *words.split())
    assert json.loads(told.out)["steps"] == 1
    assert (folder / "statistics.safetensors").is_file()
    assert PeftModel.from_pretrained(bases.load(base), out).peft_config["default"].method == "corda"


def on_terminal(code: str, **more: str) -> str:
    """What a process shows on a terminal of its own, and its exit code is 0."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))  # 40 lines of 120 columns
    told = environment(TERM="xterm-256color", **more)
    process = subprocess.Popen([sys.executable, "-c", code], env=told, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(PATIENCE) == 0, shown.decode()
    return shown.decode()


def test_a_terminal_gets_colours_and_bars_and_no_color_is_heeded(folder: Path) -> None:
    code = f"""
import os, sys
from peft_kasa_cli import main
words = ["spectrum", {str(folder / "base")!r}, "--target-modules", "q_proj"]
codes = [main(words), print("=====", flush=True), main(["doctor"]), print("=====", flush=True)]
os.environ["NO_COLOR"] = "1"
codes += [main(["doctor"]), print("=====", flush=True), main(["methods", "none"])]
sys.exit(0 if codes == [0, None, 0, None, 0, None, 1] else str(codes))
"""
    spectrum, coloured, plain, error = on_terminal(code).split("=====")
    assert "loading" in spectrum
    assert "singular values:" in spectrum  # the bar
    assert "\x1b[1m" in spectrum  # bold
    assert "\x1b[32m" in coloured  # green
    assert "\x1b[32m" not in plain
    assert "All that is needed works here." in plain
    assert error.strip().startswith("peft-kasa: The method has to be one of")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose whole decompositions take seconds."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    made = str(tmp_path_factory.mktemp("slow"))
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(made)
    return made


def test_ctrl_c_ends_in_one_line_and_the_next_run_goes_on(
    slow: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["decompose", slow, "--method", "svf", "--cache", str(tmp_path / "cache"), "--json"]
    process = subprocess.Popen(
        [*COMMAND, *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,  # pytest may run in the background
    )
    deadline = time.monotonic() + PATIENCE
    while not entries(tmp_path / "cache") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "peft-kasa: interrupted"
    assert "Traceback" not in err
    assert not out
    kept = entries(tmp_path / "cache")
    assert 0 < len(kept) < 28
    assert len(list((tmp_path / "cache").iterdir())) == len(kept)  # no temporary folder
    told = json.loads(call(capfd, *words).out)
    assert (told["decompositions"], told["reused"], told["computed"]) == (28, len(kept), 28 - len(kept))


def test_a_reader_that_has_had_enough_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    kept, (reading, writing) = os.dup(1), os.pipe()
    os.dup2(writing, 1)
    os.close(writing)
    os.close(reading)
    try:
        assert main(["methods", "--json"]) == 0
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert "peft-kasa" not in capfd.readouterr().err


def test_closed_streams_are_no_error() -> None:
    line = f"exec {sys.executable} -m peft_kasa_cli methods --json >&- <&-"
    done = subprocess.run(["sh", "-c", line], env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")


def test_gguf_files_are_models(folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """llama.cpp keeps the rows of q and k in another order: the singular values are the same."""
    path = str(tmp_path / "tiny.gguf")
    write_gguf(path, LlamaForCausalLM.from_pretrained(folder / "base"))
    found, expected = (
        json.loads(call(capfd, "spectrum", model, "--json").out)["modules"] for model in (path, str(folder / "base"))
    )
    assert [row["module"] for row in found] == [row["module"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["values"] == pytest.approx(other["values"], abs=1e-5)


BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: str, model: LlamaForCausalLM) -> None:
    """A GGUF file in float32, as llama.cpp's converter lays it out but for the order of rows in q and k."""
    import gguf

    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in model.state_dict().items():
        name = key.removesuffix(".weight")
        _, _, number, part = [*name.split(".", 3), "", "", ""][:4]
        theirs = OUTSIDE.get(name) or f"blk.{number}.{BLOCK[part]}"
        writer.add_tensor(f"{theirs}.weight", value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
