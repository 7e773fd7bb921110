"""From the command line to a command, its output and its exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from . import exits
from .errors import told
from .interrupts import heeding_sigterm
from .parser import parse

BARS = "TQDM_DISABLE"  # tqdm reads it when it is imported


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `peft-kasa` with these arguments, or the process's own, and returns the exit code.

    Examples:
        >>> from peft_kasa_cli import main
        >>> main(["--version"])  # doctest: +SKIP
    """
    debug = False
    _open_streams()
    try:
        args = parse(sys.argv[1:] if arguments is None else arguments)
        debug = args.debug
        from .output import Output, results_only  # needs rich: without it, one line and a 3

        with heeding_sigterm(), results_only() as stream, _calm(debug):
            command = import_module(f"peft_kasa.cli.{args.command}")
            return command.run(args, Output(stream, args.json)) or exits.OK
    except SystemExit as end:  # argparse, after its own message
        return end.code if isinstance(end.code, int) else exits.USAGE
    except BaseException as error:
        if debug:
            traceback.print_exc()
        code, line = told(error)
        _close_bars()
        if line:
            print(f"peft-kasa: {line}", file=sys.stderr)
        return code


def _open_streams() -> None:
    """Standard streams that were closed (`>&-`) lead nowhere: their numbers are not for other files."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process is there


def _close_bars() -> None:
    """Ends the lines of progress bars that an error has left open, so that its own line stands alone."""
    loaded = sys.modules.get("tqdm")
    for bar in list(getattr(getattr(loaded, "tqdm", None), "_instances", ())):
        bar.close()


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
