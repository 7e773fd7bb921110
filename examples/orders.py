"""The examples' task: turn an order written as one loose sentence into a short record.

    Hi! Could you send 3 kettles and a lamp to Ada Jensen in Oslo before the 14th of May?
    name: Ada Jensen; city: Oslo; by: 05-14; items: 3 kettle, 1 lamp

The sentence fixes the record: counts become digits, plurals become singulars, dates become MM-DD, a message typed
without capitals gets them back. Everything is made from a seed, so nothing has to be downloaded. The held-out orders
name people and cities that no training order names; their goods, dates and wordings are of the same kind.

    python examples/orders.py        # shows a few
"""

import random
from collections.abc import Sequence

INSTRUCTION = "Write the order as name: ...; city: ...; by: MM-DD; items: ..."

FIRST_NAMES = {
    "train": """Mary James Linda Robert Susan David Karen Peter Nora Thomas Alice George Emma Victor Julia Martin Helen
        Oscar Grace Simon Clara Henry Diana Felix Laura Arthur Sofia Daniel Irene Walter""",
    "held-out": "Ada Bruno Cecilia Dennis Eleanor Frank Gloria Howard Isabel Kevin Louise Monica Nathan Paula Ralph",
}
LAST_NAMES = {
    "train": """Smith Brown Miller Davis Wilson Moore Taylor Clark Lewis Walker Hall Young King Wright Scott Green Baker
        Adams Nelson Carter Mitchell Roberts Turner Phillips Campbell Parker Evans Edwards Collins Stewart""",
    "held-out": "Jensen Harris Morgan Cooper Bailey Murphy Rogers Reed Foster Hughes Price Bennett Barnes Fisher Grant",
}
CITIES = {
    "train": """London Paris Berlin Madrid Rome Vienna Dublin Boston Chicago Denver Toronto Sydney Prague Warsaw Lisbon
        Geneva Milan Munich Hamburg Seattle Dallas Houston Phoenix Montreal Melbourne Oxford Bristol Leeds Manchester
        Portland""",
    "held-out": """Oslo Athens Brussels Helsinki Stockholm Copenhagen Atlanta Miami Vancouver Cambridge Liverpool
        Edinburgh Florence Barcelona Detroit""",
}
GOODS = """kettle lamp chair table clock mirror basket pillow blanket candle towel bottle hammer ladder bucket rope tent
    jacket helmet camera printer keyboard monitor speaker guitar drum piano notebook pencil marker stapler folder
    envelope poster carpet curtain sofa desk drawer cabinet plate bowl spoon fork pan"""
MONTHS = "January February March April May June July August September October November December"
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 12: "a dozen"}

GREETINGS = ["", "", "", "", "Hi! ", "Hello, ", "Hey, "]
CLOSINGS = ["", "", "", "", " Thanks!", " Thank you.", " Cheers"]
WORDINGS = (
    "could you send {items} to {name} in {city} before {date}?",
    "please ship {items} to {name}, {city}, by {date}.",
    "we need {items} in {city} by {date}, for {name}.",
    "{name} from {city} ordered {items}, due {date}.",
    "can {name} get {items} by {date}? The address is in {city}.",
    "{items} for {name} please, delivered to {city} no later than {date}.",
    "my name is {name}, I live in {city} and I'd like {items} before {date}.",
    "by {date} we have to deliver {items} to {name} ({city}).",
    "new order: {items}, customer {name}, {city}, deadline {date}.",
    "{city} office, attention {name}: {items}, wanted by {date}.",
    "don't forget {name} in {city}, who wants {items} until {date}.",
    "I would like to order {items}. Send it to {name} in {city}, at the latest on {date}.",
)

Order = dict[str, str]
"""`text`: what the customer wrote; `record`: the expected answer."""


def orders(n: int, seed: int, split: str = "train") -> list[Order]:
    """`n` different orders; `split`, "train" or "held-out", says which people and cities they may name."""
    rng = random.Random(f"{split}-{seed}")
    found: dict[str, Order] = {}
    while len(found) < n:
        order = _order(rng, split)
        found.setdefault(order["text"], order)
    return list(found.values())


def train_and_held_out(n_train: int, n_held_out: int, seed: int) -> tuple[list[Order], list[Order]]:
    """Orders to train on and orders to test on; no person, no city and no text is in both."""
    train, held_out = orders(n_train, seed, "train"), orders(n_held_out, seed, "held-out")
    for values in (_names, _cities, _texts):
        assert not values(train) & values(held_out), values.__name__
    return train, held_out


def messages(order: Order) -> dict[str, list[dict[str, str]]]:
    """The order as a row for TRL: the chat that asks (`prompt`) and the answer to learn (`completion`)."""
    return {
        "prompt": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": order["text"]}],
        "completion": [{"role": "assistant", "content": order["record"]}],
    }


def score(answers: Sequence[str], expected: Sequence[Order]) -> tuple[float, float]:
    """The share of answers that are right to the letter, and the share of the four fields that are right."""
    exact = [answer == order["record"] for answer, order in zip(answers, expected, strict=True)]
    right = [_right_fields(answer, order) for answer, order in zip(answers, expected, strict=True)]
    return sum(exact) / len(exact), sum(right) / len(right) / 4


def fields(record: str) -> dict[str, str]:
    """The fields of a record: name, city, by, items."""
    return dict(part.split(": ", 1) for part in record.strip().split("; ") if ": " in part)


def _right_fields(answer: str, order: Order) -> int:
    """How many of the four fields an answer has right."""
    got, expected = fields(answer), fields(order["record"])
    return sum(got.get(field) == value for field, value in expected.items())


def _order(rng: random.Random, split: str) -> Order:
    """One random order."""
    name = f"{_word(rng, FIRST_NAMES[split])} {_word(rng, LAST_NAMES[split])}"
    city = _word(rng, CITIES[split])
    items = {item: _count(rng) for item in rng.sample(GOODS.split(), rng.choice((1, 1, 2)))}
    month, day = rng.randrange(12), rng.randint(1, 28)
    sentence = rng.choice(WORDINGS).format(
        items=_in_words(rng, items), name=name, city=city, date=_date(rng, day, MONTHS.split()[month])
    )
    greeting = rng.choice(GREETINGS)
    text = greeting + (sentence if greeting.endswith(", ") else sentence[0].upper() + sentence[1:])
    text += rng.choice(CLOSINGS)
    if rng.random() < 0.2:
        text = text.lower()
    in_digits = ", ".join(f"{count} {item}" for item, count in items.items())
    record = f"name: {name}; city: {city}; by: {month + 1:02d}-{day:02d}; items: {in_digits}"
    return {"text": text, "record": record}


def _word(rng: random.Random, words: str) -> str:
    return rng.choice(words.split())


def _count(rng: random.Random) -> int:
    return rng.choice((1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 40))


def _in_words(rng: random.Random, items: dict[str, int]) -> str:
    """`{"kettle": 3, "lamp": 1}` as "3 kettles and a lamp"."""
    phrases = []
    for item, count in items.items():
        if count == 1:
            number = rng.choice(("a", "one", "1")) if item[0] not in "aeiou" else rng.choice(("an", "one", "1"))
        else:
            number = NUMBER_WORDS[count] if count in NUMBER_WORDS and rng.random() < 0.4 else str(count)
        phrases.append(f"{number} {item}" + ("s" if count > 1 else ""))
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _date(rng: random.Random, day: int, month: str) -> str:
    """A day and a month in one of the usual ways to write them."""
    ordinal = f"{day}{'th' if 10 < day < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"
    return rng.choice((f"{day} {month}", f"{month} {day}", f"{month} {ordinal}", f"the {ordinal} of {month}"))


def _names(rows: Sequence[Order]) -> set[str]:
    """Every first and every last name in the records."""
    return {name for row in rows for name in fields(row["record"])["name"].split()}


def _cities(rows: Sequence[Order]) -> set[str]:
    return {fields(row["record"])["city"] for row in rows}


def _texts(rows: Sequence[Order]) -> set[str]:
    return {row["text"].lower() for row in rows}


if __name__ == "__main__":
    for example in orders(8, seed=0):
        print(example["text"], example["record"], sep="\n", end="\n\n")
