"""Where a module stands in its model, read off its name: the layer it is in, and what it is there."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Place(NamedTuple):
    """A module's row and column in the pictures."""

    kind: str  # "q_proj"
    depth: int  # the first number in the name


def places(names: Collection[str]) -> dict[str, Place]:
    """The place of each module. Kinds are as short as tells the modules of one layer apart, if their names do.

    Examples:
        >>> from peft_kasa.report.naming import places
        >>> places(["layers.0.attn.q", "layers.0.mlp.up", "layers.1.attn.q"])["layers.1.attn.q"]
        Place(kind='q', depth=1)
        >>> places(["enc.0.q", "dec.0.q"])["dec.0.q"]
        Place(kind='dec.q', depth=0)
    """
    longest = max((len(_words(name)) for name in names), default=1)
    for count in range(1, longest + 1):
        found = {name: Place(_kind(name, count), _depth(name)) for name in names}
        if len(set(found.values())) == len(found):
            return found
    return {name: Place(_kind(name, 1), _depth(name)) for name in names}


def _words(name: str) -> list[str]:
    return [part for part in name.split(".") if not part.isdigit()]


def _kind(name: str, count: int) -> str:
    return ".".join(_words(name)[-count:]) or "linear"


def _depth(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
