"""Greedy answers: the adapter's own, by transformers, and how another's compare with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from chat import tokenize
from orders import messages, orders
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

PROMPTS = 3
TOKENS = 32

Ids = list[int]
Ask = Callable[[str | None, Ids], Ids]
"""What a running server does: (an adapter's name, None for the base; a prompt) to its greedy tokens, at most TOKENS."""


@dataclass(frozen=True)
class Answer:
    """Tokens, and at each the distance of the best logit to the second best: small ones fall as rounding wills."""

    tokens: Ids
    gaps: list[float]


def prompts(tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """Held-out orders as chats that ask for their record, tokenised once for all servers."""
    return [tokenize(tokenizer, [messages(row)], with_answers=False)["input_ids"][0].tolist() for row in _orders()]


def own_answers(model: PeftModel, asked: Sequence[Ids], base: bool = False) -> list[Answer]:
    """What transformers answers greedily with the adapter, or with `base` without it."""
    without: AbstractContextManager[None] = model.disable_adapter() if base else nullcontext()
    with without:
        return [_greedy(model, ids) for ids in asked]


def same_until(found: Ids, expected: Answer) -> int | None:
    """The place of the first token that differs; None where all are equal."""
    pairs = zip(found, expected.tokens, strict=False)
    first = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if first is None and len(found) != len(expected.tokens):
        return min(len(found), len(expected.tokens))
    return first


@torch.inference_mode()
def _greedy(model: PeftModel, ids: Ids) -> Answer:
    made = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Answer(made.sequences[0, len(ids) :].tolist(), list(_gaps(made.logits)))


def _gaps(logits: Sequence[torch.Tensor]) -> Iterator[float]:
    for one in logits:
        best, second = one[0].float().topk(2).values.tolist()
        yield best - second


def _orders() -> list[dict[str, str]]:
    return orders(PROMPTS, 0, "held-out")
