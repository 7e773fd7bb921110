"""From the command line to a command, and from its errors to one line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from . import exits
from .parser import parse

LIMITS = {  # of the machine, by the error's name: the libraries of these are not imported here
    "OutOfMemoryError": "Give it more memory: another --device, a smaller --dtype, or fewer --target-modules.",
    "MemoryError": "Give it more memory: a smaller --dtype, or fewer --target-modules.",
    "SafetensorError": "A file of weights was not read or written whole: see to the space there, or copy it again.",
}
BARS = "TQDM_DISABLE"  # tqdm reads it when it is imported


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `peft-kasa` with these arguments, or the process's own, and returns the exit code.

    Examples:
        >>> from peft_kasa_cli import main
        >>> main(["--version"])  # doctest: +SKIP
    """
    debug = False
    try:
        args = parse(sys.argv[1:] if arguments is None else arguments)
        debug = args.debug
        from .output import Output, results_only  # needs rich: without it, one line and a 3

        with results_only() as stream, _calm(debug):
            command = import_module(f"peft_kasa.cli.{args.command}")
            return command.run(args, Output(stream, args.json)) or exits.OK
    except SystemExit as end:  # argparse, after its own message
        return end.code if isinstance(end.code, int) else exits.USAGE
    except BaseException as error:
        if debug:
            traceback.print_exc()
        code, line = told(error)
        if line:
            print(f"peft-kasa: {line}", file=sys.stderr)
        return code


def told(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an error.

    Examples:
        >>> from peft_kasa_cli.main import told
        >>> told(ValueError("r has to be at least 1.\\n  Found 0."))
        (1, 'r has to be at least 1. Found 0.')
    """
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return exits.INTERRUPTED, "interrupted"
    if isinstance(error, BrokenPipeError):  # its reader has had enough
        return exits.OK, ""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ImportError) and package != "peft_kasa":
        return exits.ENVIRONMENT, f"{line}. {_remedy(package)}" if package else line
    if isinstance(error, exits.UsageError):
        return exits.USAGE, line
    if isinstance(error, ValueError | TypeError | OSError):
        return exits.INPUT, line
    limit = LIMITS.get(type(error).__name__)
    if limit:
        return exits.INPUT, f"{line.rstrip('.')}. {limit}"
    return exits.BUG, f"{type(error).__name__}: {line}. This was not foreseen: run it again with --debug and report it."


def _remedy(package: str) -> str:
    if find_spec(package) is None:
        return f"Install it: pip install {package}"
    return f"Another version of {package} is needed here: pip install -U {package}"


@contextmanager
def _calm(debug: bool) -> Iterator[None]:
    """Keeps libraries from talking: warnings in a line each, none that are for developers; bars on terminals only."""
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET if debug else logging.ERROR)  # of kernels it lacks
    before = os.environ.get(BARS)
    if not sys.stderr.isatty():
        os.environ.setdefault(BARS, "1")
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.showwarning = _show
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(BARS, None)


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"peft-kasa: warning: {' '.join(str(message).split())}", file=sys.stderr)
