"""Sentences and their sentiment: film reviews with human ratings, or made-up ones where no file is given.

The reviews are in the source distribution of the PyPI package vaderSentiment (MIT): 10,605 sentences, each with
the mean of some twenty people's ratings from -4 to 4. This is not GLUE. SST-2, the closest task of GLUE, has sentences
of this kind, with labels of others; what is measured here cannot be put beside its figures.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

NEUTRAL = 0.5  # |rating| up to this is left out, as SST-2 leaves out neutral sentences
SPLIT_SEED = 0
SUBJECTS = "acting plot script music camera pace cast story dialogue ending humour tone"
PRAISE = "superb moving clever charming gripping graceful witty tender rich honest bold warm"
BLAME = "dull clumsy flat tedious shallow hollow messy lifeless stale crude vague cold"
FRAMES = (
    "the {0} is {1} and the {2} is {3}",
    "with {1} {0} and {3} {2}",
    "{1} {0} , {3} {2}",
    "its {2} , {3} , its {0} , {1}",
)


class Sentence(NamedTuple):
    """A sentence; its label is 1 for praise and 0 for blame."""

    text: str
    label: int


class Splits(NamedTuple):
    """No two of these share a text, whatever its case and punctuation."""

    pool: list[Sentence]
    validation: list[Sentence]
    test: list[Sentence]

    def training(self, count: int, seed: int) -> list[Sentence]:
        """The rows and order of a seed: the same for every contender."""
        return random.Random(seed).sample(self.pool, count)


def splits(sentences: Sequence[Sentence], validation: int, test: int) -> Splits:
    """Test and validation rows are the same whatever the seed of a run; the rest is the pool that runs draw from.

    Raises:
        ValueError: fewer sentences than that.
    """
    known = {key(sentence.text): sentence for sentence in reversed(sentences)}
    rows = [known[text] for text in sorted(known)]
    if len(rows) <= validation + test:
        raise ValueError(f"{validation + test} rows to hold out have to leave some of {len(rows)} sentences.")
    random.Random(SPLIT_SEED).shuffle(rows)
    return Splits(rows[validation + test :], rows[test : validation + test], rows[:test])


def key(text: str) -> str:
    """What makes two texts the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def rated(file: Path) -> list[Sentence]:
    """The sentences of a file of lines `number TAB rating TAB text`, neutral ones left out.

    Raises:
        ValueError: a line of another form.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise ValueError(f"{file}, line {number}: has to be `number TAB rating TAB text`. Found {line!r}.")
        rating = float(fields[1])
        if abs(rating) > NEUTRAL:
            found.append(Sentence(fields[2].strip(), int(rating > 0)))
    return found


def generated(count: int) -> list[Sentence]:
    """Made-up sentences, where one of two opinions is a foil behind "though": enough to see that all runs."""
    return list(_generated(count))


def _generated(count: int) -> Iterator[Sentence]:
    rng, seen = random.Random(SPLIT_SEED), set()
    while len(seen) < count:
        label = rng.randrange(2)
        mine, other = (PRAISE, BLAME) if label else (BLAME, PRAISE)
        subjects, opinions = rng.sample(SUBJECTS.split(), 3), rng.sample(mine.split(), 2)
        body = rng.choice(FRAMES).format(subjects[0], opinions[0], subjects[1], opinions[1])
        text = f"{body} , though the {subjects[2]} is {rng.choice(other.split())}"
        if text not in seen:
            seen.add(text)
            yield Sentence(text, label)
