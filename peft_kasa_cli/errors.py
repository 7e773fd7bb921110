"""From an error to one line and an exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from importlib.util import find_spec

from . import exits
from .interrupts import Terminated

MEMORY = (
    "This needs more memory than there is: free some, or let it need less with a smaller --dtype, fewer "
    "--target-modules or another --device, where the command has them."
)
SPACE = "There is too little space for what is to be written: free some, or name another place."
FILES = "A file of weights is not whole: copy it again."
LIMITS = {  # of the machine, by the error's name: the libraries of these are not imported here
    "OutOfMemoryError": MEMORY,
    "MemoryError": MEMORY,
    "SafetensorError": FILES,
}
TEXTS = {  # of errors that have no names of their own: torch's RuntimeErrors, safetensors' of reading and writing
    "allocate memory": MEMORY,  # of the CPU's allocator, and of the system
    "not enough memory": MEMORY,
    "out of memory": MEMORY,
    "ALLOC_FAILED": MEMORY,  # of cuBLAS and cuSOLVER
    "PytorchStreamWriter": SPACE,
    "inline_container": SPACE,
    "file write failed": SPACE,
    "while serializing": SPACE,
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def told(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an error.

    Examples:
        >>> from peft_kasa_cli.errors import told
        >>> told(ValueError("r has to be at least 1.\\n  Found 0."))
        (1, 'r has to be at least 1. Found 0.')
    """
    line = _line(error)
    if isinstance(error, KeyboardInterrupt):
        ended = isinstance(error, Terminated)
        return (exits.TERMINATED, "terminated") if ended else (exits.INTERRUPTED, "interrupted")
    if isinstance(error, BrokenPipeError):  # its reader has had enough
        return exits.OK, ""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ImportError) and package != "peft_kasa":
        return exits.ENVIRONMENT, f"{line}. {_remedy(package)}" if package else line
    if isinstance(error, exits.UsageError):
        return exits.USAGE, line
    for each in _met(error):
        if limit := _limit(each):
            line = _line(each)
            return exits.INPUT, line if "target_modules" in line else f"{line.rstrip('.')}. {limit}"
    if isinstance(error, ValueError | TypeError | OSError):
        return exits.INPUT, line
    return exits.BUG, f"{type(error).__name__}: {line}. This was not foreseen: run it again with --debug and report it."


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _met(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that a library was handling when it met with it: of a disk that is full, say."""
    met: BaseException | None = error
    while met is not None:
        yield met
        met = None if met.__suppress_context__ else met.__context__


def _limit(error: BaseException) -> str | None:
    """What to do where the machine is too small."""
    if isinstance(error, OSError):
        return SPACE if error.errno in FULL else MEMORY if error.errno == errno.ENOMEM else None
    name = type(error).__name__
    if name in LIMITS or isinstance(error, RuntimeError):
        return next((limit for text, limit in TEXTS.items() if text in str(error)), LIMITS.get(name))
    return None


def _remedy(package: str) -> str:
    if find_spec(package) is None:
        return f"Install it: pip install {package}"
    return f"Another version of {package} is needed here: pip install -U {package}"
