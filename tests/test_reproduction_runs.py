"""The reproduction benchmarks as a user starts them, on real models, in their smoke form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real
BENCHMARKS = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"
STARTS = {
    "classification": ["classification.py"],
    "generation-gsm8k-smollm2": ["generation.py", "--task", "gsm8k"],
}


@pytest.mark.parametrize("name", STARTS)
def test_smoke(name: str, tmp_path: Path) -> None:
    """It learns something, its file holds each seed of each contender, and the report is made of it."""
    script, *rest = STARTS[name]
    command = [sys.executable, str(BENCHMARKS / script), *rest, "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    settings, *rows = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
    assert settings["data"] == "made up"
    assert [(row["kind"], row["method"], row["seed"]) for row in rows] == [
        ("run", method, seed) for seed in (0, 1) for method in ("lora", "kasa")
    ]
    assert "| KaSA |" in done.stdout
    assert "| LoRA (PEFT) |" in done.stdout
    assert (tmp_path / f"{name}.svg").is_file()
