"""What users have as data, as batches that a model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

Batch: TypeAlias = dict[str, Tensor]
Row: TypeAlias = dict[str, list[int]]
IGNORED = -100  # the label of a token that is not to be learnt
PAD = {"attention_mask": 0, "labels": IGNORED, "token_type_ids": 0}


def batches(
    data: Any,
    tokenizer: Any = None,
    batch_size: int = 1,
    max_length: int = 2048,
    learn: bool = False,
) -> Iterator[Batch]:
    """Turns data into batches, in its order.

    Args:
        data: a DataLoader (or other iterable) of batches, which are taken as they are, or a Dataset (or other
            iterable) of rows: texts; `{"text": ...}`, `{"messages": [...]}` or `{"prompt": ..., "completion": ...}` as
            TRL's trainers take; or `{"input_ids": [...]}` with, if there are any, attention_mask, labels,
            completion_mask, assistant_masks. Of prompts no token is a label. Rows without tokens are left out.
        tokenizer: for rows that are not tokens yet. One without a pad token pads with the end of text.
        batch_size: rows in a batch; shorter ones are padded at the end, and masked.
        max_length: rows are cut to that many tokens.
        learn: leave out rows in which no token is to be learnt.

    Raises:
        ValueError: data of another form, with what was found; rows that need a tokenizer, and there is none.

    Examples:
        >>> from peft_kasa.calibration.batches import batches
        >>> for batch in batches([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}], batch_size=2):
        ...     print(batch["input_ids"].tolist(), batch["attention_mask"].tolist())
        [[5, 6, 7], [8, 0, 0]] [[1, 1, 1], [1, 0, 0]]
    """
    for name, value in {"batch_size": batch_size, "max_length": max_length}.items():
        if value < 1:
            raise ValueError(f"`{name}` has to be at least 1. Found {value}.")
    stream, first = _peeked(data)
    if _is_batch(first):
        yield from (_checked(batch) for batch in stream)
        return
    pad = _pad_token(tokenizer)
    rows = (_row(item, tokenizer, max_length) for item in stream)
    kept = (row for row in rows if row["input_ids"] and not (learn and _nothing_to_learn(row)))
    while chunk := list(islice(kept, batch_size)):
        yield _padded(chunk, pad)


class Reread:
    """What an iterator gives, as often as is wanted: read as far as is asked for, and kept."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items, self._kept = items, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        yield from self._kept
        for item in self._items:
            self._kept.append(item)
            yield item


def _peeked(data: Any) -> tuple[Iterator[Any], Any]:
    """All items, and the first of them."""
    if isinstance(data, str | bytes | Mapping) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise ValueError(
            f"Data has to be a list of texts, a Dataset or a DataLoader. Found {type(data).__name__}: put it in a list."
        )
    countable = not hasattr(data, "__iter__") and hasattr(data, "__len__")  # a map-style torch Dataset
    items: Iterator[Any] = (data[i] for i in range(len(data))) if countable else iter(data)
    try:
        first = next(items)
    except StopIteration:
        raise ValueError("Data has to have at least one row. Found none.") from None

    def stream() -> Iterator[Any]:
        yield first
        yield from items

    return stream(), first


def _is_batch(item: Any) -> bool:
    if not isinstance(item, Mapping):
        return False
    tensors = [value for value in item.values() if isinstance(value, Tensor)]
    if isinstance(ids := item.get("input_ids"), Tensor):
        return ids.ndim > 1
    return bool(tensors) and len(tensors) == len(item) and "input_ids" not in item


def _checked(batch: Any) -> Batch:
    if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
        found = {key: type(value).__name__ for key, value in batch.items()} if isinstance(batch, Mapping) else batch
        raise ValueError(f"A batch has to be a dictionary of tensors. Found {found!r}: use a collator that makes them.")
    sizes = {key: tuple(value.shape) for key, value in batch.items()}
    if not sizes or any(not size or size[0] != next(iter(sizes.values()))[0] for size in sizes.values()):
        raise ValueError(f"A batch's tensors have to have a row a sequence. Found {sizes}.")
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"`attention_mask` has to be of shape (batch, tokens). Found {tuple(mask.shape)}: give the mask of padding."
        )
    return dict(batch)


def _row(item: Any, tokenizer: Any, max_length: int) -> Row:
    if isinstance(item, str):
        row = _tokenized(item, tokenizer)
    elif not isinstance(item, Mapping):
        raise ValueError(f"A row has to be a text or a dictionary. Found {type(item).__name__}.")
    elif "input_ids" in item:
        row = _given(item)
    elif "prompt" in item and "completion" in item:
        row = _prompted(item["prompt"], item["completion"], tokenizer)
    elif "messages" in item:
        row = {"input_ids": _chat(item["messages"], tokenizer, False)}
    elif "text" in item:
        row = _tokenized(_ended(item["text"], tokenizer), tokenizer)
    else:
        raise ValueError(
            "A row has to have `input_ids`, `text`, `messages`, or `prompt` and `completion`. Found "
            f"{sorted(item)}: rename its columns."
        )
    row.setdefault("attention_mask", [1] * len(row["input_ids"]))
    return {key: value[:max_length] for key, value in row.items()}


def _given(item: Mapping[str, Any]) -> Row:
    """A row that is tokens already; columns that are nothing to a model are left out."""
    names = {*PAD, "input_ids", "completion_mask", "assistant_masks"} & item.keys()
    row: Row = {
        name: _flat(name, item[name]) for name in sorted(names) if name == "input_ids" or item[name] is not None
    }
    counted = [row.pop(name) for name in ("completion_mask", "assistant_masks") if name in row]
    if counted and "labels" not in row:
        bits = zip(*counted, strict=True)
        row["labels"] = [i if all(bit) else IGNORED for i, bit in zip(row["input_ids"], bits, strict=True)]
    if len({len(value) for value in row.values()}) > 1:
        raise ValueError(f"A row's columns have to be equally long. Found { ({k: len(v) for k, v in row.items()}) }.")
    return row


def _flat(name: str, column: Any) -> list[int]:
    """The numbers of one sequence, which may stand in a list of their own, as tokenizers make them."""
    try:
        found = torch.as_tensor(column)
    except (TypeError, ValueError, RuntimeError):  # lists of several lengths, None, texts
        found = None
    if found is None or (found.is_floating_point() and found.numel()) or found.numel() > max(found.shape, default=1):
        raise ValueError(
            f"A row's `{name}` has to be the whole numbers of one sequence. Found {_shown(column)}: give each sequence "
            "as a row, or batches as tensors."
        )
    return found.reshape(-1).tolist()


def _shown(value: Any) -> str:
    return text if len(text := repr(value)) <= 80 else f"{text[:80]}..."


def _prompted(prompt: Any, completion: Any, tokenizer: Any) -> Row:
    if isinstance(prompt, str):
        start = _tokenized(prompt, tokenizer)["input_ids"]
        ids = _tokenized(prompt + _ended(completion, tokenizer), tokenizer)["input_ids"]
    else:
        start, ids = _chat(prompt, tokenizer, True), _chat([*prompt, *completion], tokenizer, False)
    same = next((i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), min(len(start), len(ids)))
    return {"input_ids": ids, "labels": [IGNORED] * same + ids[same:]}


def _tokenized(text: str, tokenizer: Any) -> Row:
    _check_text(text)
    return {"input_ids": list(_needed(tokenizer)(text)["input_ids"])}


def _chat(messages: Any, tokenizer: Any, ask: bool) -> list[int]:
    if not getattr(_needed(tokenizer), "chat_template", None):
        raise ValueError(
            "Messages need a tokenizer with a chat template. Found none: give texts, or set its `chat_template`."
        )
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=True, return_dict=True)
    return list(found["input_ids"])


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError("Rows that are texts need a `tokenizer`. Found None: pass it, or rows with `input_ids`.")
    return getattr(tokenizer, "tokenizer", tokenizer)  # of a processor


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"A row's text has to be a string. Found {type(text).__name__}: leave such rows out.")


def _ended(text: str, tokenizer: Any) -> str:
    """With the end of text that TRL puts there."""
    _check_text(text)
    end = getattr(_needed(tokenizer), "eos_token", None) or ""
    return text if text.endswith(end) else text + end


def _pad_token(tokenizer: Any) -> int:
    if tokenizer is None:
        return 0
    tokenizer = _needed(tokenizer)
    given = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in given if token is not None), 0)


def _nothing_to_learn(row: Row) -> bool:
    """A causal model predicts from the second token on."""
    return all(label == IGNORED for label in row.get("labels", row["input_ids"])[1:])


def _padded(rows: list[Row], pad: int) -> Batch:
    length = max(len(row["input_ids"]) for row in rows)
    names: Iterable[str] = set().union(*rows)
    fill = PAD | {"input_ids": pad}
    columns = {name: [row.get(name) or _default(name, row) for row in rows] for name in sorted(names)}
    return {
        name: torch.tensor([value + [fill[name]] * (length - len(value)) for value in column])
        for name, column in columns.items()
    }


def _default(name: str, row: Row) -> list[int]:
    """A column that only other rows have."""
    return row["input_ids"] if name == "labels" else [PAD[name]] * len(row["input_ids"])
