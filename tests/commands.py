"""Commands as the pages write them: how a line is split, and what is checked of each kind without running it whole."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NoReturn
from unittest.mock import patch

from accelerate.commands.launch import launch_command_parser
from fences import ROOT, Block
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser
from trl import TrlParser

from peft_kasa.cli.sft import PARTS
from peft_kasa_cli.parser import build

ELSEWHERE = {  # programs and scripts that are not ours and not installed for the tests, and what is done about them
    "vllm": "a server; serving.md has its version",
    "vllm.entrypoints.openai.api_server": "the same server, as a module",
    "sglang.launch_server": "a server that needs a GPU",
    "convert_hf_to_gguf.py": "llama.cpp's; examples/serving/llama_cpp.py runs it",
    "convert_lora_to_gguf.py": "likewise",
    "llama-server": "llama.cpp's; examples/serving/llama_cpp_server.py runs it",
    "ollama": "not on PyPI",
    "curl": "asks vLLM",
    "lm_eval": "pins an older PEFT; tools.md has its version",
    "mergekit-yaml": "likewise",
    "mergekit-extract-lora": "likewise",
    "pre-commit": "optional, from PyPI; its hooks are commands of `make check`",
    "tar": "unpacks a source from PyPI",
}
VARIABLE = re.compile(r"[A-Z_]+=.*")


def commands(block: Block) -> Iterator[str]:
    """The commands of a bash block, or those after a prompt in a console block, each as one line."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    if block.kind == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return (shlex.join(words) for line in lines if (words := shlex.split(line, comments=True)))


def check(command: str) -> None:
    """Fails where a command is of no known kind, or could not be run as it is written."""
    words = shlex.split(command)
    while VARIABLE.fullmatch(words[0]):
        words = words[1:]
    if words[0] not in ELSEWHERE:
        assert words[0] in KINDS, f"{words[0]} is of no known kind: add a check for it, or a reason to ELSEWHERE."
        KINDS[words[0]](words[1:])


def python(words: list[str]) -> None:
    """`-c` with code, `-m` with a module, or a script."""
    first, *rest = words
    if first == "-c":
        compile(rest[0], "-c", "exec")
    elif first == "-m":
        module(*rest)
    elif first not in ELSEWHERE:
        script(first, rest)


def module(name: str, *arguments: str) -> None:
    """One of ours, or pytest, with arguments that it takes."""
    own = {"peft_kasa_cli": peft_kasa, "pytest": pytest}
    if name in own:
        own[name](list(arguments))
    elif name not in ELSEWHERE:
        assert name.startswith("peft_kasa."), f"{name} is not ours: add a reason to ELSEWHERE."
        assert find_spec(name), f"{name} is not there"
        assert not arguments, name


class ParsedError(Exception):
    """Ends a script once it has parsed its arguments."""


def script(path: str, arguments: list[str]) -> None:
    """It is there, and its own parser takes the arguments; the script ends then, before its work.

    One that imports a program from elsewhere ends there.
    """
    file, parse = ROOT / path, argparse.ArgumentParser.parse_args
    assert file.is_file(), f"{path} is not there"
    if "argparse" not in file.read_text():
        assert not arguments, f"{path} takes no arguments"
        return

    def ended(self: argparse.ArgumentParser, *given: Any) -> NoReturn:
        for action in self._actions:
            if getattr(action.type, "__name__", "") in ("a_file", "a_folder"):
                action.type = str  # the reader has the data
        parse(self, *given)
        raise ParsedError

    with patch.object(argparse.ArgumentParser, "parse_args", ended), patch.object(sys, "argv", [path, *arguments]):
        try:
            runpy.run_path(str(file), run_name="__main__")
        except ParsedError:
            return
        except ModuleNotFoundError as error:  # what it imports before it parses
            if str(error.name).split(".")[0] in ELSEWHERE:
                return
            raise
        raise AssertionError(f"{path} ended without parsing its arguments")


def torchrun(words: list[str]) -> None:
    given = get_args_parser().parse_args(words)
    if given.module:
        module(given.training_script, *given.training_script_args)
    else:
        script(given.training_script, given.training_script_args)


def accelerate(words: list[str]) -> None:
    if words == ["launch"]:  # the program's name
        return
    given = launch_command_parser().parse_args(words[1:])
    assert given.module, words
    module(given.training_script, *given.training_script_args)


def peft_kasa(words: list[str]) -> None:
    """A command's name alone, or with arguments that the command's parser takes. `...` is what a page leaves out."""
    (known,) = (action for action in build()._actions if isinstance(action, argparse._SubParsersAction))
    name, *rest = words or ["--help"]
    assert name in [*known.choices, "--help"], f"peft-kasa has no command {name}"
    if rest and rest[0] not in ("...", "--help"):
        parser = TrlParser(PARTS) if name == "sft" else known.choices[name]
        parser.parse_args(rest)


def pip(words: list[str]) -> None:
    """Extras are ours; other packages are at their tested version, or pinned here."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("verb", choices=["install", "download"])
    for switch in ("--no-deps", "--no-build-isolation"):
        parser.add_argument(switch, action="store_true")
    parser.add_argument("--no-binary")
    parser.add_argument("packages", nargs="+")
    for package in parser.parse_args(words).packages:
        _package(re.sub(r"^\.", "peft_kasa", package))


def _package(text: str) -> None:
    wanted, project = Requirement(text), (ROOT / "pyproject.toml").read_text()
    if wanted.name == "peft_kasa":
        assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in wanted.extras), text
        return
    tested = re.search(rf"^{wanted.name}==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert tested or str(wanted.specifier).startswith("=="), f"{text}: neither pinned nor in constraints.txt"
    assert not tested or wanted.specifier.contains(tested[1]), f"{text}: constraints.txt has {tested[1]}"


def make(words: list[str]) -> None:
    without = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, env=without, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pytest(words: list[str]) -> None:
    """Files are there, and markers; `-n` and `--dist` are pytest-xdist's."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("-n", type=int)
    parser.add_argument("--dist", choices=["loadfile", "loadgroup"])
    parser.add_argument("-m", choices=["real"])
    parser.add_argument("-k")
    parser.add_argument("files", nargs="*")
    for name in parser.parse_args(words).files:
        assert (ROOT / name).exists(), name


def jupyter(words: list[str]) -> None:
    assert words[0] == "execute", words
    assert (ROOT / words[1]).is_file(), words


KINDS: dict[str, Callable[[list[str]], None]] = {
    "python": python,
    ".venv/bin/python": python,
    "torchrun": torchrun,
    "accelerate": accelerate,
    "peft-kasa": peft_kasa,
    "pip": pip,
    "make": make,
    "pytest": pytest,
    "jupyter": jupyter,
}
