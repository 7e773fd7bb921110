"""vLLM's OpenAI server with the LoRAs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .adapters import Served
from .answers import TOKENS, Ask, Ids
from .process import HOST, free_port, post, running

START_SECONDS = 600
BASE = "base"
QUIET = {  # nothing is fetched, nothing is reported; a small cache and unbound threads for a shared machine
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass(frozen=True)
class VLLM:
    """The server in a dtype, which the LoRAs are rounded to as well."""

    title: str
    dtype: torch.dtype

    @contextmanager
    def serving(self, python: Path, model: str, adapters: Sequence[Served], folder: Path) -> Iterator[Ask]:
        """The server with the adapters, until the block ends."""
        port = free_port()
        url = f"http://{HOST}:{port}"

        def ask(name: str | None, ids: Ids) -> Ids:
            body = {"model": name or BASE, "prompt": ids, "max_tokens": TOKENS, "temperature": 0}
            return post(f"{url}/v1/completions", body | {"return_token_ids": True})["choices"][0]["token_ids"]

        command = self.command(python, model, adapters, port)
        with running(command, url, folder / "vllm.log", START_SECONDS, **QUIET):
            yield ask

    def command(self, python: Path, model: str, adapters: Sequence[Served], port: int) -> list[str]:
        """How it is started. The module, not `vllm serve`: that looks for a package named vllm, not vllm-cpu."""
        rank = max(adapter.export.max_lora_rank for adapter in adapters)
        dtype = str(self.dtype).removeprefix("torch.")
        start = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", HOST, "--port", str(port)]
        base = ["--model", model, "--served-model-name", BASE, "--dtype", dtype, "--max-model-len", "512"]
        small = ["--enforce-eager", "--max-num-seqs", "4", "--no-enable-prefix-caching"]
        loras = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules"]
        return [*start, *base, *small, *loras, *(f"{adapter.name}={adapter.lora}" for adapter in adapters)]
