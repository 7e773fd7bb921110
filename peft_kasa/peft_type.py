"""The one PEFT type of this package. PEFT's list of types is a closed enum, so the member is spliced into it."""

from __future__ import annotations

import enum
from typing import TypeVar

NAME = "PEFT_KASA"
PREFIX = "peft_kasa_"  # transformers derives it from the type's name
MINIMUM_PEFT = "0.21.0"

E = TypeVar("E", bound=enum.Enum)


def add_member(enumeration: type[E], name: str) -> E:
    """Adds a member whose value is its name to a `str` enum. Adding it again returns the one that is there.

    `list`, `.value`, `enumeration(name)`, `enumeration[name]`, pickling and copying treat it as any other member.
    """
    if name in enumeration.__members__:
        return enumeration[name]
    member = str.__new__(enumeration, name)  # type: ignore[type-var]
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(enumeration)  # type: ignore[attr-defined]
    member.__objclass__ = enumeration  # type: ignore[attr-defined]
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
    enumeration._member_names_.append(name)
    if hasattr(enumeration, "_hashable_values_"):  # Python 3.13 and later look values up here first
        enumeration._hashable_values_.append(name)  # type: ignore[attr-defined]
    type.__setattr__(enumeration, name, member)  # Enum's own __setattr__ refuses
    return member


def require_peft(version: str) -> None:
    """Raises ImportError where PEFT is too old for this package."""
    from packaging.version import Version

    if Version(version) < Version(MINIMUM_PEFT):
        raise ImportError(
            f"peft_kasa needs peft >= {MINIMUM_PEFT}, whose state dict hooks it uses. Found peft {version}. "
            "Run `pip install -U peft`."
        )
