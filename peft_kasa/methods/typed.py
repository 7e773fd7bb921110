"""Whether the fields of a config are what it declares: what a file could not give back is refused before training."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

PATTERNS = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "target_parameters",
)
NAMES = ("target_modules", "exclude_modules", "target_parameters")  # of which a list has no regular expressions


@cache
def _hints(config_class: type) -> dict[str, Any]:
    try:
        return get_type_hints(config_class)
    except NameError:  # a class made in a function, whose annotations name what is local there
        return {}


def check(config_class: type, given: Mapping[str, Any], where: str = "", remedy: str = "give such a value") -> None:
    """Checks each field against its annotation, and regular expressions for repeats that double the work at each
    character: not for all that may be slow.

    Args:
        config_class: the method's.
        given: its fields.
        where: what they come from, for errors. "": the class.
        remedy: for errors, too.

    Raises:
        ValueError: another type; a number that is not finite; no regular expression, or such a repeat. It names the
            field.
    """
    hints, where = _hints(config_class), where or config_class.__name__
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            kind = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise ValueError(f"{where}: {name} has to be {kind}. Found {value!r:.80}: {remedy}.")
    for name, pattern in _patterns(given):
        if _repeats_repeats(pattern):
            raise ValueError(
                f"{where}: {name} has a repeat or a choice inside a repeat, which may take for ever to match. Found "
                f"{pattern!r:.80}: name the modules, or write the expression without."
            )
        if (isinstance(given[name], str) or name not in NAMES) and (flaw := _flaw(pattern)):
            raise ValueError(
                f"{where}: {name} has to be a regular expression. Found {pattern!r:.80} ({flaw}): mend it, or name the "
                "modules."
            )


def check_after(rules: Callable[[], None], config: Any) -> None:
    """Checks a config by its own rules, which say most, and then by its annotations.

    Raises:
        ValueError: what a rule says, or `check`; the latter too where a rule cannot compare a value of another type.
    """
    try:
        rules()
    except TypeError:
        _check_fields(config)
        raise
    _check_fields(config)


def choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises ValueError if the value of a field is none of those allowed."""
    require(value in allowed, f"{name} has to be {' or '.join(map(repr, allowed))}", value)


def require(holds: bool, rule: str, found: object) -> None:
    """Raises ValueError with the rule and what was found."""
    if not holds:
        raise ValueError(f"{rule}. Found {found!r}.")


def _check_fields(config: Any) -> None:
    check(type(config), {spec.name: getattr(config, spec.name) for spec in fields(config)})


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the annotated type, as JSON has it: lists stand for sets, whole numbers for floats."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind in (list, set, tuple):
        return isinstance(value, list | set | tuple) and all(any(_fits(v, part) for part in parts) for v in value)
    if kind is dict and parts:
        return isinstance(value, dict) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, str if issubclass(kind, Enum) else kind)


def _patterns(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in PATTERNS:
        value = given.get(name) or ()
        for pattern in (value,) if isinstance(value, str) else value:
            yield name, pattern


def _flaw(pattern: str) -> str:
    """Why a pattern cannot be compiled, if it cannot."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return ""


def _repeats_repeats(pattern: str) -> bool:
    """Whether a group that holds a repeat or a choice is itself repeated, as in `(a+)+`, `(a|b)*` or `(a?b?)*`."""
    groups, closed, i = [False], False, 0  # whether each open group, and the one just closed, holds one
    while i < len(pattern):
        character, after, closed = pattern[i], closed, False
        if character == "\\":
            i += 1
        elif character == "[":
            i = _end_of_class(pattern, i)
        elif character == "(":
            groups.append(False)
        elif character == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] |= closed
        elif character == "|" or (character == "?" and pattern[i - 1 : i] != "("):
            groups[-1] = True
        elif character in "*+{":
            if after:
                return True
            groups[-1] = True
        i += 1
    return False


def _end_of_class(pattern: str, start: int) -> int:
    """Where the class that opens at `start` closes; `]` right after its opening is a member."""
    i = start + 2 if pattern[start + 1 : start + 2] == "^" else start + 1
    while (i := i + 1) < len(pattern) and pattern[i] != "]":
        i += pattern[i] == "\\"
    return i
