"""The spliced member is a member as any other, on every Python that is here; and PEFT's age is checked."""

from __future__ import annotations

import copy
import enum
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftType

import peft_kasa
from peft_kasa import peft_type
from peft_kasa.peft_type import NAME, add_member, require_peft


def fresh() -> Any:
    """A new `str` enum of two members, which pickle finds by its name."""
    made = enum.Enum("Fresh", {"FIRST": "FIRST", "SECOND": "SECOND"}, type=str, module=__name__)  # type: ignore[misc]
    globals()["Fresh"] = made
    return made


# Checks: of any enumeration and a member that `add_member` made. Their source also runs on other Pythons ----------


def is_listed_last_and_once(enumeration: Any, member: Any) -> None:
    assert list(enumeration)[-1] is member
    assert list(enumeration).count(member) == 1
    assert next(reversed(enumeration)) is member
    assert len(enumeration) == len(list(enumeration)) == len(enumeration.__members__)
    assert enumeration.__members__[member.name] is member


def has_a_name_and_a_value(enumeration: Any, member: Any) -> None:
    assert member.name == member.value == str(member.value)
    assert type(member.value) is str
    ordinary = next(iter(enumeration))
    assert repr(member) == repr(ordinary).replace(ordinary.value, member.value)
    assert str(member) == str(ordinary).replace(ordinary.value, member.value)
    assert format(member) == format(ordinary).replace(ordinary.value, member.value)


def is_looked_up_by_value_name_and_attribute(enumeration: Any, member: Any) -> None:
    assert enumeration(member.value) is member
    assert enumeration(member) is member
    assert enumeration[member.name] is member
    assert getattr(enumeration, member.name) is member
    assert member in enumeration
    assert sys.version_info < (3, 12) or member.value in enumeration  # older ones look for members only


def the_others_are_still_looked_up(enumeration: Any, member: Any) -> None:
    for other in list(enumeration)[:-1]:
        assert enumeration(other.value) is other
        assert other != member
    try:
        enumeration("NO_SUCH_VALUE")
    except ValueError:
        return
    raise AssertionError("an unknown value was found")


def is_an_instance(enumeration: Any, member: Any) -> None:
    assert isinstance(member, enumeration)
    assert isinstance(member, str)
    assert type(member) is enumeration


def is_pickled_to_itself(enumeration: Any, member: Any) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member


def is_copied_to_itself(enumeration: Any, member: Any) -> None:
    assert copy.copy(member) is member
    assert copy.deepcopy(member) is member
    assert copy.deepcopy({"type": [member]})["type"][0] is member


def equals_and_hashes_as_its_string(enumeration: Any, member: Any) -> None:
    assert member == member.value
    assert hash(member) == hash(member.value)
    assert {member: 1}[member.value] == {member.value: 1}[member] == 1
    assert json.dumps({"type": member}) == json.dumps({"type": member.value})


def is_added_once(enumeration: Any, member: Any) -> None:
    before = list(enumeration)
    assert add_member(enumeration, member.name) is member
    assert list(enumeration) == before


def is_read_only(enumeration: Any, member: Any) -> None:
    try:
        setattr(enumeration, member.name, "another")
    except AttributeError:
        return
    raise AssertionError("a member was reassigned")


def another_can_follow(enumeration: Any, member: Any) -> None:
    another = add_member(fresh(), "THIRD"), add_member(globals()["Fresh"], "FOURTH")
    assert list(globals()["Fresh"])[2:] == list(another)
    assert another[0] != another[1]
    globals()["Fresh"] = enumeration


CHECKS: list[Callable[[Any, Any], None]] = [
    is_listed_last_and_once,
    has_a_name_and_a_value,
    is_looked_up_by_value_name_and_attribute,
    the_others_are_still_looked_up,
    is_an_instance,
    is_pickled_to_itself,
    is_copied_to_itself,
    equals_and_hashes_as_its_string,
    is_added_once,
    is_read_only,
    another_can_follow,
]
each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


@each_check
def test_a_new_member_of_a_fresh_enum(check: Callable[[Any, Any], None]) -> None:
    enumeration = fresh()
    check(enumeration, add_member(enumeration, "ADDED"))


@pytest.mark.parametrize("check", CHECKS[:-1], ids=lambda check: check.__name__)
def test_the_new_member_of_pefts_enum(check: Callable[[Any, Any], None]) -> None:
    check(PeftType, PeftType[NAME])


def test_a_config_and_its_file_carry_the_member() -> None:
    config = peft_kasa.KaSAConfig()
    assert config.peft_type is PeftType(NAME)
    assert json.loads(json.dumps(config.to_dict()))["peft_type"] == NAME
    assert pickle.loads(pickle.dumps(config)).peft_type is config.peft_type
    assert copy.deepcopy(config).peft_type is config.peft_type


# Other Pythons --------------------------------------------------------------------------------------------------


def interpreters() -> dict[str, str]:
    """The Pythons on this machine that start and that the package is for, by version; always this one."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = {"{}.{}".format(*sys.version_info): sys.executable}
    for minor in range(10, 20):
        name = f"python3.{minor}"
        for path in (shutil.which(name), *sorted(map(str, versions.glob(f"*/bin/{name}")))):
            if path and f"3.{minor}" not in found and starts(path):
                found[f"3.{minor}"] = path
    return found


def starts(path: str) -> bool:
    return subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0


PYTHONS = interpreters()
SCRIPT = "\n".join(
    [
        "import copy, enum, json, pickle, runpy, sys",
        "from typing import Any",
        'add_member = runpy.run_path(sys.argv[1])["add_member"]',
        *(inspect.getsource(function) for function in (fresh, *CHECKS)),
        f"for check in ({', '.join(check.__name__ for check in CHECKS)}):",
        "    enumeration = fresh()",
        '    check(enumeration, add_member(enumeration, "ADDED"))',
        '    print(check.__name__, "held")',
    ]
)


@pytest.mark.parametrize("python", PYTHONS.values(), ids=PYTHONS)
def test_a_new_member_on_other_pythons(python: str) -> None:
    """peft_type.py needs the standard library alone, so a bare interpreter will do."""
    command = [python, "-I", "-c", SCRIPT, str(Path(peft_type.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held") == len(CHECKS)


# PEFT's age -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.20.0", "0.9.1", "0.21.0.dev0"])
def test_an_old_peft_is_refused_with_the_remedy(version: str) -> None:
    with pytest.raises(ImportError, match=rf"needs peft >= 0\.21.*Found peft {version}.*`pip install -U peft`"):
        require_peft(version)


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.100.0", "1.0"])
def test_a_new_peft_is_welcome(version: str) -> None:
    require_peft(version)
