"""Serve adapters of the family as plain LoRA in vLLM and llama.cpp, and compare the text with the adapter's own.

From nothing, on a CPU, without the Hugging Face Hub. The script

1. trains KaSA, PiSSA and LoRA-XS adapters on SmolLM2-135M for a few steps (orders.py), and keeps them,
2. exports each with `export_lora`, and KaSA once more at half the rank (`rank=`), which is not exact,
3. makes a virtual environment for each server, and keeps it,
4. starts each server on loopback with the base and the LoRAs, asks it the same prompts, and stops it,
5. asks the adapters themselves (transformers, same dtype, greedy) and compares token by token.

    python examples/serve.py
    python examples/serve.py --servers llama_cpp --adapters kasa pissa

The environments take 3.4 GB (vLLM) and 1.4 GB (llama.cpp) and some minutes, once; the servers' releases are pinned.
"""

import argparse
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from types import FrameType

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too

import torch
from base_model import cache_home, smollm2
from chat import load_tokenizer
from finetune import METHODS
from serving import environments
from serving.adapters import NAMES, Served, exported, trained
from serving.compare import Comparison, compare, show
from serving.error import ServingError
from serving.llama_cpp import LlamaCpp
from serving.vllm import VLLM
from transformers.utils import logging

SERVERS = {  # each with what makes its environment
    "vllm": (VLLM("vLLM, bf16", torch.bfloat16), environments.vllm),
    "vllm_f32": (VLLM("vLLM, f32", torch.float32), environments.vllm),
    "llama_cpp": (LlamaCpp(), environments.llama_cpp),
}
DEFAULT = ("vllm", "llama_cpp")


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, _end)  # so that a server that runs is stopped then, too
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.disable_progress_bar()
    started = time.time()
    try:
        pythons = {name: SERVERS[name][1](args.environments) for name in args.servers}
        model = smollm2()
        served = [one for name in args.adapters for one in exports(name, model, args.output)]
        for one in served:
            print(f"{one.name:<10} {one.export}")
        tokenizer = load_tokenizer(model)
        results: list[Comparison] = []
        for name in args.servers:
            print(f"\nStarting {name} ...", flush=True)
            results += compare(SERVERS[name][0], pythons[name], model, tokenizer, served, args.output)
        show(results, tokenizer)
    except ServingError as error:
        sys.exit(f"\n{error}")
    print(f"\n{time.time() - started:.0f} s in all; adapters, LoRAs and logs are in {args.output}")


def parse_args() -> argparse.Namespace:
    """The command line, checked before any work starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(DEFAULT), help=" ".join(DEFAULT))
    parser.add_argument("--adapters", nargs="+", choices=METHODS, default=list(NAMES), help=" ".join(NAMES))
    parser.add_argument("--output", type=Path, default=Path("outputs/serving"), help="folder of adapters and logs")
    parser.add_argument("--environments", type=Path, default=cache_home() / "servers", help="folder of environments")
    args = parser.parse_args()
    for name in ("output", "environments"):
        folder = getattr(args, name).absolute()
        if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
            parser.error(f"--{name} {folder}: a file is in the way")
        setattr(args, name, folder)
    return args


def exports(name: str, model: str, folder: Path) -> list[Served]:
    """An adapter as an exact LoRA and, for KaSA, cut to the rank that it was trained with."""
    own = trained(name, model, folder)
    half = [exported("kasa_cut", own, model, rank=METHODS["kasa"][1])] if name == "kasa" else []
    return [exported(name, own, model), *half]


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
