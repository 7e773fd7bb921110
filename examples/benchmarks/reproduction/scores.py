"""What a generated answer is worth: BLEU and ROUGE-L for sentences, the final number for sums."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

References = Sequence[Sequence[str]]


def exact_match(answers: Sequence[str], references: References) -> dict[str, float]:
    """The share of answers whose final number is the reference's."""
    pairs = [(number(mine), number(known[0])) for mine, known in zip(answers, references, strict=True)]
    hits = [found is not None and found == expected for found, expected in pairs]
    return {"exact_match": sum(hits) / len(hits)}


def number(text: str) -> Decimal | None:
    """The number after `####`, or the last one where there is no such mark; thousands' commas do not count.

    Example:
        >>> number("so 1,250 + 3 = 1,253.00 dollars"), number("4 + 4 = 8\\n#### 8"), number("many")
        (Decimal('1253.00'), Decimal('8'), None)
    """
    marked = text.rpartition("####")[2]
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", marked)
    return None if not found else Decimal((found[0] if "####" in text else found[-1]).replace(",", ""))


def overlap(answers: Sequence[str], references: References) -> dict[str, float]:
    """Corpus BLEU over all references (0 to 100), and the mean ROUGE-L F1 against the best of them (0 to 1)."""
    most = max(map(len, references))
    columns = [[known[i] if i < len(known) else None for known in references] for i in range(most)]
    scorer = RougeScorer(["rougeL"])
    rouge = [
        scorer.score_multi(list(known), mine)["rougeL"].fmeasure
        for mine, known in zip(answers, references, strict=True)
    ]
    return {"bleu": sacrebleu.corpus_bleu(list(answers), columns).score, "rouge_l": sum(rouge) / len(rouge)}


SCORES: dict[str, Callable[[Sequence[str], References], dict[str, float]]] = {"e2e": overlap, "gsm8k": exact_match}
