"""The parts of examples/serve.py that need no server of others: processes, comparison, commands, environments."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from serving import environments
from serving.adapters import Served
from serving.answers import Answer, same_until
from serving.error import ServingError
from serving.process import HOST, free_port, post, running
from serving.vllm import VLLM

from peft_kasa import LoraExport

SERVER = """
import http.server, os, sys
open(sys.argv[2], "w").write(str(os.getpid()))
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, code, text):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text)
    def do_GET(self):
        self.answer(200, b"ok")
    def do_POST(self):
        self.answer(*((200, b'{"a": 1}') if self.path == "/good" else (400, b"no such adapter")))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def start(tmp_path: Path, code: str, *arguments: str) -> list[str]:
    script = tmp_path / "server.py"
    script.write_text(textwrap.dedent(code))
    return [sys.executable, str(script), *arguments]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_server_answers_and_is_stopped_when_the_block_fails(tmp_path: Path) -> None:
    port = free_port()
    url, pid = f"http://{HOST}:{port}", tmp_path / "pid"
    command = start(tmp_path, SERVER, str(port), str(pid))

    def ask() -> None:
        with running(command, url, tmp_path / "log", 60):
            assert post(f"{url}/good", {}) == {"a": 1}
            post(f"{url}/bad", {})

    with pytest.raises(ServingError, match="/bad refused: 400 no such adapter"):
        ask()
    assert gone(int(pid.read_text()))


def test_a_server_that_ends_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    command = start(tmp_path, "print('rank 24 is above 16'); raise SystemExit(3)")
    with (
        pytest.raises(ServingError, match=r"(?s)ended with code 3.*rank 24 is above 16"),
        running(command, f"http://{HOST}:{free_port()}", tmp_path / "log", 60),
    ):
        raise AssertionError("it did not start")


def test_a_server_that_never_answers_is_stopped_in_time(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    command = start(tmp_path, f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)", "")
    with (
        pytest.raises(ServingError, match="did not answer within 3 s"),
        running(command, f"http://{HOST}:{free_port()}", tmp_path / "log", 3),
    ):
        raise AssertionError("it did not answer")
    assert gone(int(pid.read_text()))


@pytest.mark.parametrize(
    ("found", "first"),
    [([5, 6, 7], None), ([5, 9, 7], 1), ([5, 6], 2), ([5, 6, 7, 8], 3), ([], 0)],
)
def test_the_first_difference(found: list[int], first: int | None) -> None:
    assert same_until(found, Answer([5, 6, 7], [1.0, 1.0, 1.0])) == first


def test_vllm_is_told_the_largest_rank_and_listens_on_loopback(tmp_path: Path) -> None:
    adapters = [
        Served(name, tmp_path, LoraExport(rank, largest, {}, f"/loras/{name}"))
        for name, rank, largest in (("a", 8, 8), ("b", 24, 32))
    ]
    command = VLLM("vLLM", torch.bfloat16).command(Path("python"), "base", adapters, 8000)
    assert command[command.index("--max-lora-rank") + 1] == "32"
    assert command[command.index("--dtype") + 1] == "bfloat16"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--lora-modules") + 1 :] == ["a=/loras/a", "b=/loras/b"]


def test_an_environment_is_ready_for_what_it_holds_alone(tmp_path: Path) -> None:
    environments._finish(tmp_path, ["torch==2.13.0"])
    assert environments._is_ready(tmp_path, ["torch==2.13.0"])
    assert not environments._is_ready(tmp_path, ["torch==2.13.0", "more"])
    assert not environments._is_ready(tmp_path / "none", [])


def test_a_command_that_fails_is_an_error_with_its_last_words() -> None:
    with pytest.raises(ServingError, match=r"(?s)failed:\n.*no such thing"):
        environments.run(sys.executable, "-c", "raise SystemExit('no such thing')")
