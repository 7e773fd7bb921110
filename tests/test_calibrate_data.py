"""Which data calibration reads: rows, texts, messages, datasets and loaders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases import load, logits
from calibrating import ALL, ROWS, equal
from peft import get_peft_model
from torch.utils.data import DataLoader

from peft_kasa import CorDAConfig, EVAConfig, LoRASBConfig, calibrate
from peft_kasa.calibration.batches import batches

# Data -----------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of letters, without a pad token, which chats."""

    eos_token, eos_token_id, pad_token_id = "$", 63, None
    chat_template: str | None = "yes"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [63 if c == "$" else ord(c) % 61 for c in text]}

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool, **_: Any) -> dict[str, list[int]]:
        text = "".join(f"{m['role'][0]}:{m['content']};" for m in messages) + "a:" * add_generation_prompt
        return self(text)


def of(data: Any, **given: Any) -> list[dict[str, list[Any]]]:
    return [{key: value.tolist() for key, value in batch.items()} for batch in batches(data, **given)]


def test_rows_of_every_kind_become_tokens() -> None:
    letters = Letters()
    ids = letters("ab")["input_ids"]
    assert of(["ab"], tokenizer=letters)[0]["input_ids"] == [ids]
    assert of([{"text": "ab"}], tokenizer=letters)[0]["input_ids"] == [[*ids, 63]]
    both = of([{"prompt": "ab", "completion": "c"}], tokenizer=letters)[0]
    assert both["labels"] == [[-100, -100, ord("c") % 61, 63]]
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    chat = of([{"messages": [user, answer]}], tokenizer=letters)[0]
    assert chat["input_ids"] == [letters("u:x;a:y;")["input_ids"]]
    asked = of([{"prompt": [user], "completion": [answer]}], tokenizer=letters)[0]
    assert asked["labels"] == [[-100] * 6 + letters("y;")["input_ids"]]
    masked = of([{"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "text": "abc"}])[0]
    assert masked["labels"] == [[-100, 2, 3]]


def test_rows_are_padded_cut_and_left_out() -> None:
    found = of(["abcd", "", "a"], tokenizer=Letters(), batch_size=2, max_length=3)
    assert found == [{"input_ids": [[36, 37, 38], [36, 63, 63]], "attention_mask": [[1, 1, 1], [1, 0, 0]]}]
    rows = [{"input_ids": [1, 2], "labels": [1, -100]}, {"input_ids": [1, 2], "labels": [-100, 2]}]
    assert [batch["labels"] for batch in of(rows, learn=True)] == [[[-100, 2]]]
    assert of([{"input_ids": [1]}, {"input_ids": [1, 2], "labels": [-100, 2]}], batch_size=2)[0]["labels"] == [
        [1, -100],
        [-100, 2],
    ]


def test_datasets_and_loaders_are_read(tiny: str) -> None:
    datasets = pytest.importorskip("datasets")

    class Mapped(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(ROWS)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return ROWS[index] if index < len(ROWS) else {}["past the end"]

    model = load(tiny)
    expected = calibrate(model, ROWS, EVAConfig(**ALL), batch_size=2)
    loader = DataLoader(ROWS, batch_size=2, collate_fn=lambda rows: next(batches(rows, batch_size=2)))
    for data in (datasets.Dataset.from_list(ROWS), Mapped(), loader, list(loader)):
        assert equal(calibrate(model, data, EVAConfig(**ALL), batch_size=2), expected)
    assert calibrate(model, loader, EVAConfig(**ALL), samples=3).seen == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a text", "put it in a list"),
        ([], "at least one row"),
        ([3], "Found int"),
        ([{"sentence": "x"}], "rename its columns"),
        (["x"], "need a `tokenizer`"),
        ([{"input_ids": [1, 2], "labels": [1]}], "equally long"),
        ([{"input_ids": [[1, 2], [3, 4]]}], r"one sequence. Found \[\[1, 2\], \[3, 4\]\]: give each sequence as a row"),
        ([{"input_ids": [[1, 2, 3], [4, 5]]}], "`input_ids` has to be the whole numbers of one sequence"),
        ([{"input_ids": None}], "`input_ids` has to be the whole numbers of one sequence. Found None"),
        ([{"input_ids": [1.0, 2.0]}], "`input_ids` has to be the whole numbers of one sequence"),
        ([{"input_ids": torch.ones(2, 3)}, {}], "a row a sequence"),
        ([{"text": None}], "Found NoneType: leave such rows out"),
        ([{"input_ids": torch.ones(2, 3), "text": ["a", "b"]}], "dictionary of tensors"),
        ([{"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 1, 3, 3)}], r"of shape \(batch, tokens\)"),
    ],
)
def test_data_of_another_form_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(batches(data))


def test_a_column_that_only_other_rows_have_may_be_none() -> None:
    """As `datasets` fills such columns."""
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3, 4], "labels": None}]
    assert of(rows, batch_size=2)[0]["labels"] == [[-100, 2], [3, 4]]


def test_a_generator_is_read_as_a_list_is(tiny: str) -> None:
    """Rows that are left out do not count, and no more is read than is needed."""
    read = []

    def stream() -> Any:
        for place in range(100):
            read.append(place)
            yield {"input_ids": [1, 2, place % 60] if place % 2 else [1]}  # nothing to learn in every other

    model = load(tiny)
    found = calibrate(model, stream(), LoRASBConfig(**ALL), samples=4)
    assert found.seen == 4
    assert equal(found, calibrate(model, list(stream()), LoRASBConfig(**ALL), samples=4))
    read.clear()
    adapted = get_peft_model(load(tiny), LoRASBConfig(**ALL))
    assert calibrate(adapted, stream(), samples=4, memory=1).seen == 4  # many passes
    assert read == list(range(8))


def test_messages_need_a_template() -> None:
    letters = Letters()
    letters.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        list(batches([{"messages": [{"role": "user", "content": "x"}]}], letters))


@pytest.mark.real
def test_texts_on_a_real_model() -> None:
    from base_model import smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    texts = [f"Question: what is {i} plus {i + 3}? Answer: {2 * i + 3}." for i in range(4)]
    config = CorDAConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"])
    found = calibrate(model, texts, config, tokenizer=tokenizer, batch_size=2)
    assert found.seen == 4
    before = logits(model, torch.arange(1000, 1024)[None])
    wrapped = get_peft_model(model, config)
    torch.testing.assert_close(logits(wrapped, torch.arange(1000, 1024)[None]), before)
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]} for text in texts
    ]
    steps = calibrate(
        model := AutoModelForCausalLM.from_pretrained(smollm2()),
        chats,
        LoRASBConfig(**ALL | {"target_modules": ["v_proj"]}),
        tokenizer=tokenizer,
    )
    assert len(steps.names) == model.config.num_hidden_layers
