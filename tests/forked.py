"""Processes of `peft-kasa` that begin where its imports are done: a server that forks one for each that is asked for.

A process is as a user's, with its own signals, standard streams, end and exit code, but begins at once.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import bases
from launch import PATHS
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_kasa import KaSAConfig

COMMANDS = ("convert", "decompose", "export", "inspect", "merge", "sft", "spectrum")
LIBRARIES = ("altair", "vl_convert", "peft_kasa.report.page", "peft_kasa.report.picture")
WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # audit events of files
PATIENCE = 120  # seconds


class Ended(NamedTuple):
    """How a process has ended: its exit code, what it wrote, and which files it was about to touch, by event."""

    code: int
    out: str
    err: str
    events: list[str]


class Server:
    """Starts processes of a command.

    Args:
        process: this file, running.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, cwd: Path, words: str, **given: Any) -> Ended:
        """Runs a command to its end, in a folder.

        Args:
            cwd: the folder. Events below it count.
            words: of the command line.
            given: `at`, the number of the event at which signals come to the process, or a text that is in its
                description; `signals`, their numbers (SIGINT); `memory` and `file`, bytes that may be allocated and
                written into one file.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"cwd": str(cwd), "words": words.split(), "notes": str(cwd.parent / "notes"), **given}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        out, err, events = (Path(f"{request['notes']}.{name}").read_text() for name in ("out", "err", "events"))
        return Ended(code, out, err, events.splitlines())


@contextmanager
def server() -> Iterator[Server]:
    """A server, which ends with the block."""
    path = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PEFT_KASA_CACHE": "0"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, __file__], env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Server(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(PATIENCE)


def serve() -> None:
    """Forks a process for each line of standard input, and answers with its exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    for name in COMMANDS:
        import_module(f"peft_kasa.cli.{name}")
    for name in LIBRARIES:
        import_module(name)
    warm()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def warm() -> None:
    """Lets libraries import and build what they do at their first use."""
    with tempfile.TemporaryDirectory() as folder:
        bases.make(folder)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), KaSAConfig(target_modules=["q_proj"]))
        model.save_pretrained(folder)
    gc.collect()
    gc.freeze()


def become(request: dict[str, Any]) -> None:
    """Is the command from here on."""
    from peft_kasa_cli import main

    signal.alarm(PATIENCE)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may run in the background
    os.chdir(request["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(created(request, "out"), 1)
    os.dup2(created(request, "err"), 2)
    watch(request)
    limit(request)
    sys.exit(main(request["words"]))


def created(request: dict[str, Any], name: str) -> int:
    """A file for what is noted of the process."""
    return os.open(f"{request['notes']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def limit(request: dict[str, Any]) -> None:
    """Lets the process have so much further memory, and files of so many bytes."""
    import resource

    if "memory" in request:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + request["memory"],) * 2)
    if "file" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file"],) * 2)


def watch(request: dict[str, Any]) -> None:
    """Notes each event that changes a file in the folder, and sends the process its signals before the one asked for.

    Several signals come one at an event, from there on.
    """
    notes = created(request, "events")
    at, left, seen = request.get("at"), list(request.get("signals", [signal.SIGINT])), 0

    def heard(event: str, words: tuple[Any, ...]) -> None:
        nonlocal seen, at
        if event not in WRITES or not _changes(event, words, request["cwd"]):
            return
        told, number = f"{event} {_within(words[0], request['cwd'])}", seen
        seen += 1
        os.write(notes, f"{told}\n".encode())
        if left and (number == at or (isinstance(at, str) and at in told)):
            at = number + 1
            os.kill(os.getpid(), left.pop(0))

    sys.addaudithook(heard)


def _changes(event: str, words: tuple[Any, ...], folder: str) -> bool:
    """Whether an event changes something below a folder, or in an open one."""
    if event == "open" and not words[2] & (os.O_WRONLY | os.O_RDWR):
        return False
    if event in ("os.remove", "os.rmdir") and words[1] != -1:
        return True
    return not isinstance(words[0], int) and not _within(words[0], folder).startswith(os.pardir)


def _within(path: Any, folder: str) -> str:
    return os.path.relpath(os.fsdecode(path), folder)


if __name__ == "__main__":
    serve()
