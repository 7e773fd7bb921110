"""Every Python block of the README and the docs runs, page by page, on tiny stand-ins for the models it names."""

from __future__ import annotations

import os
import re
import string
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from fences import PAGES, ROOT, blocks
from hub_server import serving
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_kasa import KaSAConfig
from peft_kasa.methods.table import table

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB = ROOT / "docs" / "hub.md"  # its blocks need a Hub
LETTERS = ["<pad>", "<eos>", "<unk>", *string.ascii_lowercase]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(LETTERS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the Hub ids of the docs are folders with tiny models."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    for name in (SMOLLM2, "meta-llama/Llama-2-7b-hf"):
        LlamaForCausalLM(llama).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    roberta = RobertaConfig(
        vocab_size=64, hidden_size=768, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_labels=2
    )
    RobertaForSequenceClassification(roberta).save_pretrained(folder / "FacebookAI/roberta-base")
    return folder


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, no report, no progress bar, no checkpoints, batches of two, and the CPU.

    So a recipe is not run quite as it stands: without a GPU a reader adds `use_cpu=True, bf16=False` by hand, as the
    pages say. What a block sets itself stays, but for the number of steps.
    """
    few = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    for arguments in (trl.SFTConfig, trl.DPOConfig, trl.GRPOConfig, trl.RewardConfig):

        def short(self: Any, *args: Any, whole: Any = arguments.__init__, **given: Any) -> None:
            few_steps = {"max_steps": 2} if "max_steps" in given else {}
            whole(self, *args, **(few | {"per_device_train_batch_size": 2} | given | few_steps))

        monkeypatch.setattr(arguments, "__init__", short)


def python(page: Path) -> str:
    """The Python blocks of a page, each on its own lines."""
    code = ""
    for block in blocks("python"):
        if block.page == page:
            code += "\n" * (block.line - code.count("\n")) + block.text
    return code


def given(page: Path) -> dict[str, Any]:
    """What a page's reader has already."""
    if page.name not in ("README.md", "distributed.md"):
        return {}
    model = LlamaForCausalLM.from_pretrained(SMOLLM2)
    if page.name == "README.md":
        return {"model": model}
    return {"model": get_peft_model(model, KaSAConfig(r=8)), "path": "saved", "rank": 0}


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("page", [page for page in PAGES if page != HUB], ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(page: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(python(page), str(page), "exec"), {"__name__": "__main__", **given(page)})


def test_blocks_that_need_the_hub_run(hub: Path) -> None:
    """In a process, since the libraries read its address when they are imported."""
    with serving() as server:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | server.environment | {"HF_HOME": str(hub / "home"), "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", python(HUB)], cwd=hub, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "lora/adapter_model.safetensors" in (server.files("me/kasa-smollm2") or {})


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = page.read_text()
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", text):
            path = page.parent / target if target else page
            assert path.exists(), f"{page}: {target}"
            if anchor:
                headings = [
                    re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
                    for heading in re.findall(r"^#+ (.*)$", path.read_text(), re.M)
                ]
                assert anchor in headings, f"{page}: {target}#{anchor}"


def test_the_table_of_the_family_is_what_the_configs_do() -> None:
    assert table() in (ROOT / "docs" / "algebra.md").read_text()
