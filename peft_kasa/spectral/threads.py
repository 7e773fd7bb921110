"""How many threads a decomposition takes: LAPACK's bits depend on it, and where cores are shared its time too."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.RLock()  # the count belongs to the process
_worker = threading.local()


@contextmanager
def limited(count: int) -> Iterator[None]:
    """Runs the body with `count` threads, whatever torch has now; a sweep's worker keeps what it has."""
    if getattr(_worker, "settled", False):
        yield
        return
    with _lock:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def become_worker(count: int) -> None:
    """Makes the calling thread a worker of a sweep, with a fixed count."""
    torch.set_num_threads(count)
    _worker.settled = True
