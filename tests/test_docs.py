"""Every Python block of the README and the docs runs, page by page, on tiny stand-ins for the models it names."""

from __future__ import annotations

import re
import string
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_kasa.methods.table import table

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))
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
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-2-7b-hf"):
        LlamaForCausalLM(llama).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    roberta = RobertaConfig(
        vocab_size=64, hidden_size=768, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_labels=2
    )
    RobertaForSequenceClassification(roberta).save_pretrained(folder / "FacebookAI/roberta-base")
    return folder


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps are enough to see that a recipe runs."""
    few = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    for arguments in (trl.SFTConfig, trl.DPOConfig, trl.GRPOConfig, trl.RewardConfig):

        def short(self: Any, *args: Any, whole: Any = arguments.__init__, **given: Any) -> None:
            few_steps = {"max_steps": 2} if "max_steps" in given else {}
            whole(self, *args, **(few | {"per_device_train_batch_size": 2} | given | few_steps))

        monkeypatch.setattr(arguments, "__init__", short)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_blocks_run(page: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    text = (ROOT / page).read_text()
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
            line = text[: block.start()].count("\n") + 1
            exec(compile("\n" * line + block[1], str(page), "exec"), names)


def test_links_lead_somewhere() -> None:
    for page in [Path("README.md"), *PAGES]:
        text = (ROOT / page).read_text()
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", text):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), f"{page}: {target}"
            if anchor:
                headings = [
                    re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
                    for heading in re.findall(r"^#+ (.*)$", path.read_text(), re.M)
                ]
                assert anchor in headings, f"{page}: {target}#{anchor}"


def test_the_table_of_the_family_is_what_the_configs_do() -> None:
    assert table() in (ROOT / "docs" / "algebra.md").read_text()
