"""Starts a script of this folder in two processes, as torchrun does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PATHS = [str(FOLDER.parent), str(FOLDER), str(FOLDER.parent / "examples" / "benchmarks")]


def torchrun(script: str, *arguments: str, **environment: str) -> str:
    """Runs it to its end, and returns what it wrote; fails with that if a process fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [*command, str(FOLDER / script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout
