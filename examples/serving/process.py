"""A server as a process of its own on loopback: waited for, asked over HTTP, and stopped whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .error import ServingError

HOST = "127.0.0.1"
REQUEST_SECONDS = 300
STOP_SECONDS = 15


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: Sequence[str], url: str, log: Path, seconds: float, **environment: str) -> Iterator[None]:
    """The server that `command` starts, from when `url`/health answers until the block ends.

    Raises:
        ServingError: it ended, or did not answer within `seconds`; with the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
            start_new_session=True,  # so that its own children can be stopped with it
        )
    try:
        _wait_until_healthy(server, url, log, seconds)
        yield
    finally:
        _stop(server)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a JSON request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ServingError(f"{url} refused: {error.code} {error.read().decode(errors='replace')[:500]}") from None
    except OSError as error:
        raise ServingError(f"{url} did not answer within {REQUEST_SECONDS} s, or not at all: {error}") from None


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise ServingError(f"The server ended with code {server.returncode}. {log} ends in:\n{_tail(log)}")
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(1)
    raise ServingError(f"The server did not answer within {seconds:.0f} s. {log} ends in:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:].strip()


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Ask the server and its children to end; those that stay are killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
