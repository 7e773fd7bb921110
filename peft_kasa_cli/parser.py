"""The arguments of each command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import exits

MODEL = "a Hub id, a folder with config.json, or a .gguf file"
ADAPTER = "the folder, or the Hub id, of a saved adapter"
SHARED = {"--json": "print the result as JSON, and nothing else", "--debug": "show where an error came from"}
PATH: Any = os.path.expanduser  # what a shell leaves of ~, as in --html=~/x.html
DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line, with the command's name in `command`.

    Raises:
        SystemExit: after help or a version (0), or a message about what is wrong (2).
    """
    rest = [word for word in arguments if word not in SHARED]
    if rest and rest[0] == "sft":  # TRL's own parser reads the rest
        given = {name.removeprefix("--"): name in arguments for name in SHARED}
        return argparse.Namespace(command="sft", rest=rest[1:], **given)
    return build().parse_args(arguments)


def build() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="peft-kasa",
        description="KaSA and the SVD family of fine-tuning methods for PEFT, from the command line.",
        epilog=exits.HELP,
    )
    _shared(parser, False)
    parser.add_argument("--version", action="version", version=f"peft-kasa {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_methods, _spectrum, _inspect, _export, _merge, _convert, _decompose, _sft, _doctor):
        add(_adder(commands))
    return parser


Add = Callable[[str, str], argparse.ArgumentParser]


def _adder(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> Add:
    """Adds a command that has the options of all."""

    def add(name: str, what: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what, epilog=exits.HELP)
        _shared(command, argparse.SUPPRESS)
        return command

    return add


def _shared(parser: argparse.ArgumentParser, default: Any) -> None:
    """The options of all, before the command's name or after it: SUPPRESS leaves what was given before."""
    for name, what in SHARED.items():
        parser.add_argument(name, action="store_true", default=default, help=what)


def _methods(add: Add) -> None:
    command = add("methods", "The family: what each method learns, how many numbers, and its rank as a LoRA.")
    command.add_argument("name", nargs="?", help="one method: its paper, its arguments and their defaults")
    command.add_argument("--model", type=PATH, help=f"count what learns in this model ({MODEL}); no weights are read")
    command.add_argument("--r", type=int, help="the rank to count at (default: each method's own)")


def _spectrum(add: Add) -> None:
    command = add("spectrum", "The singular spectra of a model's linear layers, and the ranks that they suggest.")
    command.add_argument("model", type=PATH, help=MODEL)
    command.add_argument(
        "--ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="at which energy and KaSA's cut are given"
    )
    command.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], metavar="NAME", help="default: all-linear"
    )
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they are stored)")
    _pages(command)


def _inspect(add: Add) -> None:
    command = add("inspect", "What a saved adapter is: its method, ranks, sizes and the spectra of its updates.")
    command.add_argument("adapter", type=PATH, help=ADAPTER)
    command.add_argument("--base", type=PATH, help=f"also compare with the base's spectra ({MODEL})")
    command.add_argument("--against", type=PATH, metavar="OTHER", help="another adapter to compare with")
    _pages(command)


def _pages(command: argparse.ArgumentParser) -> None:
    command.add_argument("--html", type=PATH, metavar="FILE", help="write a report with charts; FILE ends in .html")
    command.add_argument("--png", type=PATH, metavar="FILE", help="write a picture; FILE ends in .png")


def _export(add: Add) -> None:
    command = add("export", "Write an adapter as a plain LoRA, exactly, for PEFT alone, vLLM, SGLang or llama.cpp.")
    _adapter(command)
    command.add_argument("--rank", type=int, help="cut every module to this rank; the error is reported")
    command.add_argument(
        "--per-module", action="store_true", help="each module its own rank: PEFT reads that, servers do not"
    )


def _merge(add: Add) -> None:
    command = add("merge", "Write the base model with an adapter's update in its weights, and the tokenizer.")
    _adapter(command)
    command.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights (default: as the base has them)"
    )


def _convert(add: Add) -> None:
    command = add(
        "convert", "Write a LoRA, or PEFT's PiSSA or OLoRA, as an adapter of this package, where that is exact."
    )
    _adapter(command)
    command.add_argument(
        "--initial",
        type=PATH,
        metavar="ADAPTER",
        help="the adapter as it was saved before training: for starts with random parts",
    )


def _adapter(command: argparse.ArgumentParser) -> None:
    """What commands share that turn an adapter into a folder."""
    command.add_argument("adapter", type=PATH, help=ADAPTER)
    command.add_argument("out", type=PATH, help="the folder to write")
    command.add_argument("--base", type=PATH, help=f"the base model (default: the one that the adapter names): {MODEL}")
    command.add_argument("--overwrite", action="store_true", help="replace OUT where it holds an adapter or a model")


def _decompose(add: Add) -> None:
    command = add(
        "decompose", "Compute a method's decompositions of a model ahead, into the cache. Run again, it goes on."
    )
    command.add_argument("model", type=PATH, help=MODEL)
    command.add_argument("--method", required=True, help="see `peft-kasa methods`")
    command.add_argument("--r", type=int, help="the rank (default: the method's own)")
    command.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], metavar="NAME", help="default: all-linear"
    )
    command.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="further arguments of the method's config, such as truncation=4",
    )
    command.add_argument(
        "--cache", type=PATH, metavar="FOLDER", help="default: $PEFT_KASA_CACHE, or ~/.cache/peft_kasa/decompositions"
    )
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="of the base, as you will train on it")
    command.add_argument("--device", help="where to compute, as you will train (default: CUDA if there is any)")


def _sft(add: Add) -> None:
    add("sft", "TRL's supervised fine-tuning with any method. `peft-kasa sft --help` lists all of TRL's options, too.")


def _doctor(add: Add) -> None:
    add(
        "doctor",
        "What is installed, and what works here: devices, quantised bases, the plug-in. 3 if something is broken.",
    )


def _version() -> str:
    try:
        return version("peft_kasa")
    except PackageNotFoundError:  # run from a copy that is not installed
        return "(not installed)"
