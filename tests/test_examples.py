"""The examples run from their command line to their last check, on tiny models; on the real ones with `-m real`."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import bases
import chat
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from orders import messages, orders
from reviews import reviews
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(chat.__file__).parent
NOTEBOOK = EXAMPLES / "kasa_story.ipynb"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NUMBER = r"([-+\d.e]+)"


def run(name: str, *arguments: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs an example in this process. It ends the process where one of its own checks fails."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.chdir(out)
    importlib.import_module(name).main()


def numbers(pattern: str, text: str) -> list[float]:
    """Those in the place of each # of a pattern that occurs once."""
    (found,) = re.findall(re.escape(pattern).replace(r"\#", NUMBER), text)
    return [float(number) for number in ([found] if isinstance(found, str) else found)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random chat model."""
    return make_chat_model(str(tmp_path_factory.mktemp("chat")))


def make_chat_model(folder: str) -> str:
    """Saves it, with its tokenizer."""
    words = tokenizer()
    config = bases.fresh().config.to_dict() | {"vocab_size": len(words), "max_position_embeddings": 1024}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random encoder."""
    folder, words = str(tmp_path_factory.mktemp("encoder")), tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


# What they share --------------------------------------------------------------------------------------------------


def test_only_answers_count_in_a_loss(chat_model: str) -> None:
    """Against transformers' own loss of one chat whose prompt's labels are masked."""
    model, words = chat.load_model(chat_model, torch.float32), chat.load_tokenizer(chat_model)
    rows = [messages(order) for order in orders(5, 0)]
    total = count = 0.0
    for row in rows:
        whole = words.apply_chat_template(row["prompt"] + row["completion"], return_tensors="pt", return_dict=True)
        asked = words.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        labels = whole["input_ids"].clone()
        labels[:, : len(asked)] = -100
        answered = (labels != -100).sum().item()
        with torch.no_grad():
            total += model(**whole, labels=labels).loss.item() * answered
        count += answered
    assert chat.mean_loss(model, words, rows) == pytest.approx(total / count, rel=1e-5)


def test_the_training_loop_learns_the_answers(chat_model: str) -> None:
    model, words = chat.load_model(chat_model, torch.float32), chat.load_tokenizer(chat_model)
    rows = [messages(order) for order in orders(4, 0)] * 6
    losses = chat.train(model, words, rows, lr=1e-2, batch_size=4)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert not model.training


def test_no_subject_and_no_judgement_of_held_out_reviews_was_trained_on() -> None:
    train, held_out = reviews("train"), reviews("held-out")
    assert (len(train), len(held_out)) == (384, 72)
    for rows in (train, held_out):
        assert sum(label for _, label in rows) * 2 == len({text for text, _ in rows}) == len(rows)
    assert not {text for text, _ in train} & {text for text, _ in held_out}


# On tiny models ---------------------------------------------------------------------------------------------------

TINY = {
    "finetune": ["--method", "pissa", "--steps", "2"],
    "corda_sft": ["--steps", "2"],
    "qlora": ["--steps", "2"],
    "dpo": ["--steps", "2", "--method", "kasa"],
    "several_adapters": ["--steps", "2"],
}


@pytest.mark.parametrize("name", TINY)
def test_it_runs(name: str, chat_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(name, "--model", chat_model, *TINY[name], out=tmp_path, monkeypatch=monkeypatch)


def test_federated_counts_what_is_sent(
    chat_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--clients", "2", "--rounds", "2", "--steps", "2", "--r", "8"]
    run("federated", "--model", chat_model, *given, out=tmp_path, monkeypatch=monkeypatch)
    text = capsys.readouterr().out.replace(",", "")
    sent, of_lora = numbers("a client sends # bytes a round; LoRA of rank 8 would send # ", text)
    (kv, square, wide), layers = (64 + 32, 64 + 64, 64 + 128), 2
    assert sent == 4 * 8 * 8 * 7 * layers
    assert of_lora == 4 * 8 * (2 * kv + 2 * square + 3 * wide) * layers
    assert numbers("round 2: the mean's loss # on held-out orders; # bytes", text)[1] == 2 * 2 * sent


def test_classify(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("classify", "--model", encoder, "--steps", "2", out=tmp_path, monkeypatch=monkeypatch)
    saved = (tmp_path / "outputs" / "classify" / "adapter_config.json").read_text()
    assert '"classifier"' in saved


def test_share(
    chat_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run("share", "--model", chat_model, out=tmp_path, monkeypatch=monkeypatch)
    text = capfd.readouterr().out
    assert "(PEFT_KASA): logits equal bit for bit" in text
    assert numbers("(LORA): logits differ by #\n", text)[0] < 1e-5
    assert "lora/adapter_model.safetensors" in text
    assert "| text-generation | Orders | loss |" in text


# On the real ones -------------------------------------------------------------------------------------------------

REAL = {  # what each prints of before and after, the second to be the better one
    "qlora": (["--steps", "8"], "held-out orders # before, # after"),
    "corda_sft": (["--steps", "8"], "held-out orders # before, # after"),
    "dpo": (["--steps", "6"], "DPO loss: # at the first step (log 2 = 0.693147), # at the last"),
}


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_it_learns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, pattern = REAL[name]
    run(name, *arguments, out=tmp_path, monkeypatch=monkeypatch)
    before, after = numbers(pattern, capsys.readouterr().out)
    assert after < before


@pytest.mark.real
@pytest.mark.parametrize("name", ["federated", "several_adapters", "classify"])
def test_it_runs_on_the_real_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"classify": "20"}.get(name, "3")
    run(name, "--steps", steps, out=tmp_path, monkeypatch=monkeypatch)


# The notebook -----------------------------------------------------------------------------------------------------


def shown(book: nbformat.NotebookNode) -> list[list[str]]:
    """What kinds of data each output of a notebook has."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return [sorted(output.data) for output in outputs if "data" in output]


def test_the_notebook_is_small_and_was_run() -> None:
    """Its outputs are kept: pictures, and every number of the story, which the text between cells does not state."""
    book = nbformat.read(NOTEBOOK, 4)
    assert NOTEBOOK.stat().st_size < 400_000
    assert sum("image/png" in kinds for kinds in shown(book)) >= 6
    for cell in book.cells:
        assert cell.cell_type == "code" or not re.search(r"\d\.\d", cell.source.replace("2412.06071", ""))


@pytest.mark.real
def test_the_notebook_runs() -> None:
    """To its end, with what it asserts, and shows what is kept in it."""
    book = nbformat.read(NOTEBOOK, 4)
    kept = shown(book)
    NotebookClient(book, timeout=1800, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    assert shown(book) == kept
