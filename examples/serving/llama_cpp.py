"""llama.cpp's server with the LoRAs, in float32: the base and the LoRAs become GGUF files first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .adapters import Served
from .answers import TOKENS, Ask, Ids
from .environments import run
from .error import ServingError
from .process import HOST, free_port, post, running

START_SECONDS = 120
SCRIPT = Path(__file__).with_name("llama_cpp_server.py")


@dataclass(frozen=True)
class LlamaCpp:
    """The server in float32."""

    title: str = "llama.cpp, f32"
    dtype: torch.dtype = torch.float32

    @contextmanager
    def serving(self, python: Path, model: str, adapters: Sequence[Served], folder: Path) -> Iterator[Ask]:
        """The server with the adapters, until the block ends."""
        port = free_port()
        url = f"http://{HOST}:{port}"
        numbers = {adapter.name: number for number, adapter in enumerate(adapters)}

        def ask(name: str | None, ids: Ids) -> Ids:
            # Adapters that are not listed weigh 0.
            lora = [{"id": numbers[name], "scale": 1.0}] if name else []
            body = {"prompt": ids, "n_predict": TOKENS, "temperature": 0, "lora": lora}
            return post(f"{url}/completion", body | {"return_tokens": True, "cache_prompt": False})["tokens"]

        files = [_base(python, model, folder), *(_lora(python, model, adapter, folder) for adapter in adapters)]
        command = [str(python), str(SCRIPT), str(port), *map(str, files)]
        with running(command, url, folder / "llama_cpp.log", START_SECONDS):
            yield ask


def _base(python: Path, model: str, folder: Path) -> Path:
    made = folder / "gguf" / "base-f32.gguf"
    if not made.is_file():
        _convert(python, made, "convert_hf_to_gguf.py", model)
    return made


def _lora(python: Path, model: str, adapter: Served, folder: Path) -> Path:
    made = folder / "gguf" / f"{adapter.name}-f32.gguf"
    _convert(python, made, "convert_lora_to_gguf.py", str(adapter.lora), "--base", model)
    return made


def _convert(python: Path, made: Path, script: str, *arguments: str) -> None:
    """Run a converter of llama.cpp; what it leaves when it fails has another name."""
    made.parent.mkdir(parents=True, exist_ok=True)
    unfinished = made.with_suffix(".part")
    run(str(python), str(_converters(python) / script), *arguments, "--outtype", "f32", "--outfile", str(unfinished))
    unfinished.rename(made)


def _converters(python: Path) -> Path:
    found = list(python.parents[1].rglob("llama.cpp/convert_lora_to_gguf.py"))
    if not found:
        raise ServingError(f"{python.parents[1]} has no convert_lora_to_gguf.py: remove that folder and run again")
    return found[0].parent
