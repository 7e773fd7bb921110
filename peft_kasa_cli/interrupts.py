"""Ctrl-C and SIGTERM: both end a command by an exception, so that what it was writing is cleared away."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FINISHING = "peft-kasa: finishing the files that are being written; once more, and they are dropped\n"


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """SIGTERM raises `Terminated` meanwhile.

    Not where somebody heeds it already. Nor in one of a launcher's processes: that has to end even where it waits for
    the others, in code that lets no exception in.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or "LOCAL_RANK" in os.environ:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def finishing() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block, and then do what they always do. A second one breaks it off.

    Examples:
        >>> import signal
        >>> from peft_kasa_cli.interrupts import finishing
        >>> try:
        ...     with finishing():
        ...         signal.raise_signal(signal.SIGINT)
        ...         print("done")
        ... except KeyboardInterrupt:
        ...     print("interrupted")
        done
        interrupted
    """
    if not _in_main_thread() or isinstance(signal.getsignal(signal.SIGINT), _Note):  # a block in a block
        yield
        return
    note = _Note()
    heeded = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for seen in note.seen:
            signal.raise_signal(seen)


class _Note:
    """A handler that notes a signal, and raises at the second of its kind."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number in self.seen:
            _raise(number, frame)
        self.seen.append(number)
        line = f"\n{FINISHING}" if os.isatty(2) else FINISHING  # after ^C, or a bar
        os.write(2, line.encode())  # a print may have been interrupted itself


def _raise(number: int, _: FrameType | None) -> None:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
