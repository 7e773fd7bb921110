"""Generation with small causal models, trained by TRL's SFTTrainer on completions: E2E (BLEU, ROUGE-L), GSM8K (exact
match of the final number under greedy decoding), and the held-out loss of both; over several seeds.

    python examples/benchmarks/generation.py --task e2e --data FOLDER                        # SmolLM2-135M
    python examples/benchmarks/generation.py --task gsm8k --model gemma --data FOLDER        # Gemma-3-270M
    python examples/benchmarks/generation.py --task gsm8k --smoke                            # 2 minutes on 2 CPU cores

The whole of it is work for a GPU, which it uses if there is one; `--steps`, `--batch-size`, `--test` make it smaller.
Rates and seeds are treated as by classification.py, and each run is a line of the file of results.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too
sys.path.append(str(Path(__file__).resolve().parents[1]))

from measured import commit, machine, versions
from reproduction.adapters import CONTENDERS
from reproduction.generator import Settings, Trials
from reproduction.publish import publish
from reproduction.report import Measure
from reproduction.results import Results
from reproduction.study import WIDER, Study
from reproduction.texts import TASKS, Splits
from transformers.utils import logging

NAMES = ["lora", "dora", "peft_pissa", "kasa", "pissa", "milora", "sorsa", "lora_xs", "svft_plain"]
GRID = [3e-4, 1e-3, 3e-3]
VALIDATION = 256
FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
LOSS = Measure("test_loss", "test loss", digits=3, more_is_better=False)
MEASURES = {
    "e2e": [Measure("test_bleu", "BLEU"), Measure("test_rouge_l", "ROUGE-L", 100), LOSS],
    "gsm8k": [Measure("test_exact_match", "exact match, %", 100), LOSS],
}


def main() -> None:
    args = parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = f"generation-{args.task}-{args.model.replace('/', '-')}"
    if not args.report:
        measure(args, name)
    publish(args.output, name, MEASURES[args.task])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma, a folder or a Hub id")
    parser.add_argument("--data", type=Path, help="folder with the data set's own files; made up if left out")
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=NAMES, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", nargs="+", type=float, default=GRID, help="the grid of learning rates")
    parser.add_argument("--wider", type=int, default=WIDER, help="rates beyond the grid, where the best is at its edge")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=256, help="that an answer may have")
    parser.add_argument("--test", type=int, help="prompts to answer; all if left out")
    parser.add_argument("--smoke", action="store_true", help="two contenders, two seeds, made-up data, a few steps")
    parser.add_argument("--report", action="store_true", help="only write the table and the plot again")
    parser.add_argument("--output", type=Path, help="folder of the file of results")
    args = parser.parse_args()
    if args.data and not args.data.is_dir():
        parser.error(f"--data {args.data}: no such folder")
    if args.smoke:
        args.data, args.methods, args.seeds, args.rates = None, ["lora", "kasa"], [0, 1], [3e-3]
        args.wider = 0
        args.steps, args.batch_size, args.new_tokens, args.test = 4, 4, 24, 4
    args.output = args.output or (Path(tempfile.mkdtemp(prefix="generation-")) if args.smoke else FOLDER)
    return args


def measure(args: argparse.Namespace, name: str) -> Results:
    settings = Settings(args.model, args.task, args.rank, args.steps, args.batch_size, new_tokens=args.new_tokens)
    data = TASKS[args.task](args.data, 8 if args.smoke else VALIDATION)
    data = Splits(data.train, data.validation, data.test[: args.test])
    protocol: dict[str, Any] = asdict(settings) | {"rates": args.rates, "test": len(data.test)}
    protocol |= {"data": "its own" if args.data else "made up", "validation": len(data.validation)}
    about = {"machine": machine(), "versions": versions(), "commit": commit()}
    results = Results(args.output / f"{name}.jsonl", protocol, about)
    Study(Trials(settings, data), results, args.rates, args.wider)(args.methods, args.seeds)
    return results


if __name__ == "__main__":
    main()
