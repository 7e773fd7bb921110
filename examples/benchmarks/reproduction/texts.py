"""Prompts with completions: E2E (a meaning representation to a sentence), GSM8K (a question to a worked answer).

From a folder with the data sets' own files, or made up where none is given: enough to see that all runs.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

SPLIT_SEED = 0
MADE_UP = 240  # examples
NAMES = "Anna Bert Clara David Emil Frida"
THINGS = "apples stamps marbles pencils cards shells"
PLACES = ["The Punter", "Blue Spice", "Loch Fyne", "The Mill", "Cotto", "Zizzi"]
FOODS = "Italian French Indian Chinese English Japanese"
AREAS = ["riverside", "city centre"]


class Example(NamedTuple):
    """A prompt, the completion to learn, and all that a generated answer may be measured against."""

    prompt: str
    completion: str
    references: tuple[str, ...]


class Splits(NamedTuple):
    """No prompt is in two of these."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]

    def training(self, count: int, seed: int) -> list[Example]:
        """The rows and order of a seed, the same for every contender; each row again only when all were used."""
        rng, found = random.Random(seed), list[Example]()
        while len(found) < count:
            found += rng.sample(self.train, min(len(self.train), count - len(found)))
        return found


def e2e(folder: Path | None, validation: int) -> Splits:
    """E2E NLG; the development set is trained on where there is no `trainset.csv`, less what validates.

    Every prompt is once in validation and test, with all its references.
    """
    if folder is None:
        pairs = _meanings()
        return _split(pairs[: 3 * MADE_UP // 4], pairs[3 * MADE_UP // 4 :], validation, meaning)
    train = folder / "trainset.csv"
    return _split(
        _table(train if train.is_file() else folder / "devset.csv"),
        _table(folder / "testset_w_refs.csv"),
        validation,
        meaning,
    )


def gsm8k(folder: Path | None, validation: int) -> Splits:
    """GSM8K: of the training questions, the last of a fixed order validate."""
    if folder is None:
        pairs = _sums()
        return _split(pairs[: 3 * MADE_UP // 4], pairs[3 * MADE_UP // 4 :], validation, question)
    return _split(_lines(folder / "train.jsonl"), _lines(folder / "test.jsonl"), validation, question)


TASKS: dict[str, Callable[[Path | None, int], Splits]] = {"e2e": e2e, "gsm8k": gsm8k}


def meaning(text: str) -> str:
    return f"Data: {text}\nSentence:"


def question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


def _split(
    train: Iterable[tuple[str, str]], test: Iterable[tuple[str, str]], validation: int, prompt: Callable[[str], str]
) -> Splits:
    held_out = _grouped(test)
    known = {asked: answers for asked, answers in _grouped(train).items() if asked not in held_out}
    if len(known) <= validation:
        raise ValueError(f"{validation} prompts to validate with have to leave some of {len(known)}.")
    order = sorted(known)
    random.Random(SPLIT_SEED).shuffle(order)
    return Splits(
        [_example(prompt(asked), [answer]) for asked in order[validation:] for answer in known[asked]],
        [_example(prompt(asked), known[asked]) for asked in order[:validation]],
        [_example(prompt(asked), answers) for asked, answers in held_out.items()],
    )


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for asked, answer in pairs:
        found.setdefault(asked.strip(), []).append(answer.strip())
    return found


def _example(prompt: str, answers: list[str]) -> Example:
    return Example(prompt, f" {answers[0]}", tuple(answers))


def _table(file: Path) -> list[tuple[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return [(row["mr"], row["ref"]) for row in csv.DictReader(lines)]


def _lines(file: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(row["question"], row["answer"]) for row in rows]


def _meanings() -> list[tuple[str, str]]:
    """Made-up meaning representations, all of another name, food, area and rating."""
    kinds = [(p, f, a, r) for p in PLACES for f in FOODS.split() for a in AREAS for r in range(1, 6)]
    random.Random(SPLIT_SEED).shuffle(kinds)
    return [
        (
            f"name[{place}], food[{food}], customer rating[{rating} out of 5], area[{area}]",
            f"{place} serves {food} food in the {area} area and is rated {rating} out of 5.",
        )
        for place, food, area, rating in kinds[:MADE_UP]
    ]


def _sums() -> list[tuple[str, str]]:
    """Made-up questions of one addition."""
    rng, found = random.Random(SPLIT_SEED), dict[str, str]()
    while len(found) < MADE_UP:
        name, thing = rng.choice(NAMES.split()), rng.choice(THINGS.split())
        have, more = rng.randint(2, 60), rng.randint(2, 60)
        asked = f"{name} has {have} {thing} and gets {more} more. How many {thing} does {name} have?"
        found[asked] = f"{name} has {have} + {more} = {have + more} {thing}.\n#### {have + more}"
    return list(found.items())
