"""Short reviews for classify.py: is the writer pleased (1) or not (0)?

A review is a subject with a judgement, such as "The soup was not worth the money." Subjects and judgements of the
held-out reviews are in no training review, and each subject comes with as many good words as bad ones: the subject
tells nothing. Both kinds have negations, so that single words tell little.

    python examples/reviews.py        # shows a few
"""

import random

SUBJECTS = {
    "train": """the soup; the room; the film; the battery; this novel; the waiter; our flight; the hotel; the jacket;
        the lecture; the camera; the concert""",
    "held-out": "the pasta; the keyboard; the museum; this podcast; the driver; the garden tour",
}
JUDGEMENTS = {
    ("train", 1): """{} was a delight from start to finish; {} was not bad at all; {} exceeded what we had hoped for;
        I would choose {} again without a second thought; {} was worth every penny; nothing about {} could be improved;
        I had doubts, but {} won me over; {} made our day; I can't praise {} enough; {} did not let us down;
        {} was far from boring; we loved {} more than we can say; {} was a pleasant surprise; {} could not be faulted;
        who would not be happy with {}; {} was anything but a mistake""",
    ("train", 0): """{} was a letdown from start to finish; {} was not good at all; {} fell short of what we had hoped
        for; I would not choose {} again; {} was not worth the money; a lot about {} could be improved;
        I had hopes, but {} put me off; {} ruined our day; I can't recommend {} to anyone; {} did let us down;
        {} was far from exciting; we disliked {} more than we can say; {} was an unpleasant surprise;
        {} could not be enjoyed; who would be happy with {}; {} was nothing but a mistake""",
    ("held-out", 1): """{} was better than anyone had told us; I have no complaints about {}; we were lucky to find {};
        {} left us with a smile; {} is the best that I know; there was nothing to dislike about {}""",
    ("held-out", 0): """{} was worse than anyone had told us; I have many complaints about {}; we were sorry to find {};
        {} left us with a headache; {} is the worst that I know; there was nothing to like about {}""",
}

Review = tuple[str, int]


def reviews(split: str, seed: int = 0) -> list[Review]:
    """All reviews of a split, "train" (384) or "held-out" (72), in random order: texts with their labels."""
    found = [
        (_sentence(judgement, subject), label)
        for label in (0, 1)
        for judgement in _parts(JUDGEMENTS[split, label])
        for subject in _parts(SUBJECTS[split])
    ]
    random.Random(seed).shuffle(found)
    return found


def _sentence(judgement: str, subject: str) -> str:
    text = judgement.format(subject)
    return text[0].upper() + text[1:] + "."


def _parts(listed: str) -> list[str]:
    return [" ".join(part.split()) for part in listed.split(";")]


if __name__ == "__main__":
    for text, label in reviews("train")[:8]:
        print(label, text)
