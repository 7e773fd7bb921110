"""One server's answers beside the adapters' own, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .adapters import Served, load_adapted
from .answers import Answer, Ids, own_answers, prompts, same_until
from .llama_cpp import LlamaCpp
from .vllm import VLLM


@dataclass(frozen=True)
class Comparison:
    """A server's answers with one adapter: `found` is the server's, `own` and `base` are transformers'."""

    server: str
    adapter: str
    found: list[Ids]
    own: list[Answer]
    base: list[Answer]


def compare(
    server: VLLM | LlamaCpp,
    python: Path,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    served: Sequence[Served],
    folder: Path,
) -> list[Comparison]:
    """All adapters on one server, which is stopped before transformers is asked: memory holds one model at a time."""
    asked = prompts(tokenizer)
    with server.serving(python, model, served, folder) as ask:
        found = {one.name: [ask(one.name, ids) for ids in asked] for one in served}
    base: list[Answer] = []
    own: dict[Path, list[Answer]] = {}
    for path in dict.fromkeys(one.own for one in served):
        adapted = load_adapted(model, path, server.dtype)
        base = base or own_answers(adapted, asked, base=True)
        own[path] = own_answers(adapted, asked)
    return [Comparison(server.title, one.name, found[one.name], own[one.own], base) for one in served]


def show(results: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase) -> None:
    """The table, then the first prompt's texts."""
    print(f"\n{'server':<15} {'adapter':<10} {'equal texts':>11}   first difference (prompt, token; gap of the logits)")
    for one in results:
        first = [_difference(place, found, own) for place, found, own in _numbered(one)]
        differ = [text for text in first if text]
        equal = f"{len(first) - len(differ)} of {len(first)}"
        print(f"{one.server:<15} {one.adapter:<10} {equal:>11}   {'; '.join(differ) or '-'}")
    show_texts(results, tokenizer)


def show_texts(results: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase) -> None:
    """What was answered to the first prompt: the base, the adapter itself, the server."""
    previous: list[Comparison | None] = [None, *results]
    for before, one in pairwise(previous):
        assert one
        if before is None or before.server != one.server:
            print(f"\n{one.server}, first prompt\n  {'base model':<22}{_text(tokenizer, one.base[0].tokens)}")
        print(f"  {one.adapter + ', itself':<22}{_text(tokenizer, one.own[0].tokens)}")
        print(f"  {one.adapter + ', served':<22}{_text(tokenizer, one.found[0])}")


def _numbered(one: Comparison) -> list[tuple[int, Ids, Answer]]:
    return [(place, *pair) for place, pair in enumerate(zip(one.found, one.own, strict=True), start=1)]


def _difference(prompt: int, found: Ids, own: Answer) -> str:
    token = same_until(found, own)
    if token is None:
        return ""
    gap = f"{own.gaps[token]:.3f}" if token < len(own.gaps) else "it went on"
    return f"{prompt}, {token + 1} of {len(own.tokens)}; {gap}"


def _text(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> str:
    return " ".join(str(tokenizer.decode(ids, skip_special_tokens=True)).split())
