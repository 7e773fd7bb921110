"""What keeps the package readable: the direction of imports, sizes, docstrings with doctests, and a page a method."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from members import MEMBERS, Member

import peft_kasa
from peft_kasa import spectral

PACKAGE = Path(peft_kasa.__file__).parent
DOCS = Path(__file__).parents[1] / "docs"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = ["peft_kasa", *(found.name for found in pkgutil.walk_packages(peft_kasa.__path__, "peft_kasa."))]
LEAVES = ["files", "peft_type"]
ORDER = [
    *LEAVES,
    "spectral",
    "methods",
    "adapter",
    "sharing",
    "calibration",
    "training",
    "report",
    "register",
    "cli",
    "__init__",
]  # each may import those before it
HEADINGS = [
    "Idea",
    "Equations",
    "When to use it",
    "Arguments",
    "Memory and speed",
    "What differs from the paper's code",
    "Example",
]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name) for module in (peft_kasa, spectral) for name in module.__all__
}
USED = [  # what a user calls; the rest are types that he reads or extends
    *(name for name, thing in PUBLIC.items() if inspect.isfunction(thing)),
    *(f"peft_kasa.{member.config_class.__name__}" for member in MEMBERS),
    *(f"peft_kasa.spectral.{name}" for name in spectral.__all__),
    "peft_kasa.SpectralModel",
]

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)


# Imports --------------------------------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def nodes(tree: ast.AST, typing: bool) -> Iterator[ast.AST]:
    """All nodes, those in functions too; those under `if TYPE_CHECKING` where asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing:
            continue
        yield node
        yield from nodes(node, typing)


def imports(path: Path, typing: bool = True) -> set[str]:
    """The full names of all that a file imports: modules, and names in modules."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    found: set[str] = set()
    for node in nodes(ast.parse(path.read_text()), typing):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (above, node.module) if part)
            found.update(f"{source}.{alias.name}" for alias in node.names)
    return found


def folder(module: str) -> str:
    """The part of the package that a full name belongs to."""
    part = [*module.split("."), "__init__"][1]
    return part if part in ORDER else "__init__"


def test_every_part_of_the_package_has_its_place_in_the_order() -> None:
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} == set(ORDER)


@each_file
def test_imports_go_one_way(path: Path) -> None:
    own = folder(module_of(path))
    allowed = set() if own in LEAVES else set(ORDER[: ORDER.index(own) + 1])
    assert {folder(name) for name in imports(path) if name.partition(".")[0] == "peft_kasa"} <= allowed


def test_no_module_imports_itself_round_a_circle() -> None:
    """At run time; names that only annotations need may go round."""

    def within(name: str) -> str:
        return name if name in MODULES else name.rpartition(".")[0]

    graph = {
        module_of(path): {within(name) for name in imports(path, typing=False) if name.startswith("peft_kasa")}
        for path in FILES
        if path.name != "__init__.py"
    }
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", sorted((PACKAGE / "spectral").rglob("*.py")), ids=lambda path: path.name)
def test_spectral_knows_numbers_only(path: Path) -> None:
    hosts = {"peft", "transformers", "accelerate", "trl", "bitsandbytes", "huggingface_hub"}
    assert not {name.partition(".")[0] for name in imports(path)} & hosts


@each_member
def test_a_method_imports_the_numbers_and_the_contract_alone(member: Member) -> None:
    """Not PEFT, not another method."""
    path = Path(inspect.getfile(member.config_class))
    assert not {name.partition(".")[0] for name in imports(path)} & {"peft", "transformers"}
    others = {f"peft_kasa.methods.{other.name}" for other in MEMBERS if other is not member}
    assert not {name.rpartition(".")[0] for name in imports(path)} & others


# Sizes ----------------------------------------------------------------------------------------------------------


def lines_of_code(path: Path) -> int:
    """Lines that are not blank, comment or docstring."""
    source = path.read_text()
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            code.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(code)


@each_member
def test_a_method_is_under_60_lines_of_code(member: Member) -> None:
    assert 5 < lines_of_code(Path(inspect.getfile(member.config_class))) < 60


@each_file
def test_a_file_is_under_250_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 250


def test_lines_of_code_are_counted_without_docstrings_comments_and_blanks(tmp_path: Path) -> None:
    path = tmp_path / "counted.py"
    path.write_text(
        '"""Two\n\nlines."""\n\n# one\nx = [\n    1,  # two\n]\n\n\ndef f():\n    """Doc."""\n    return """a\nb"""\n'
    )
    assert lines_of_code(path) == 6


# Docstrings and doctests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring_of_its_own(name: str) -> None:
    doc = PUBLIC[name].__doc__
    assert doc
    assert not doc.startswith(f"{name.rpartition('.')[2]}(")  # what dataclasses and named tuples make up


@pytest.mark.parametrize("name", USED)
def test_what_users_call_has_a_doctest(name: str) -> None:
    assert doctest.DocTestParser().get_examples(PUBLIC[name].__doc__)


@pytest.mark.parametrize("name", MODULES)
def test_doctests_pass(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_all_is_what_there_is() -> None:
    for module in (peft_kasa, spectral):
        assert all(hasattr(module, name) for name in module.__all__)
        assert len(set(module.__all__)) == len(module.__all__)


# Pages ----------------------------------------------------------------------------------------------------------


def headings(page: Path) -> list[str]:
    """Those of the second level, fenced code apart."""
    return re.findall(r"^## +(.+?) *$", re.sub(r"(?ms)^```.*?^```", "", page.read_text()), re.M)


@each_member
def test_every_method_has_a_page_with_the_same_headings(member: Member) -> None:
    assert headings(DOCS / "methods" / f"{member.name}.md") == HEADINGS


def test_every_method_is_a_member() -> None:
    """A new method needs a row in tests/members.py: the properties know of no other list."""
    known: dict[str, Any] = importlib.import_module("peft_kasa.methods").methods()
    shipped = {name: config for name, config in known.items() if config.__module__.startswith("peft_kasa.")}
    assert shipped == {member.name: member.config_class for member in MEMBERS}
