"""What `import peft_kasa` costs after `import peft`: seconds of CPU, medians of fresh processes.

python examples/benchmarks/imports.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

CODE = """
import time
started = time.process_time()
import peft
between = time.process_time()
import peft_kasa
print(between - started, time.process_time() - between)
"""


def measure() -> tuple[float, float]:
    """Seconds for PEFT, with torch and transformers, and for this package on top."""
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    peft, ours = map(float, done.stdout.split())
    return peft, ours


def main() -> None:
    peft, ours = zip(*(measure() for _ in range(5)), strict=True)
    print(f"import peft: {statistics.median(peft):.2f} s; peft_kasa on top: {statistics.median(ours):.2f} s")


if __name__ == "__main__":
    main()
