"""Generation with small causal models, trained by TRL's SFTTrainer on completions: E2E (BLEU, ROUGE-L), GSM8K (exact
match of the final number under greedy decoding), and the held-out loss of both; over several seeds.

    python examples/benchmarks/generation.py --task e2e --data FOLDER                        # SmolLM2-135M
    python examples/benchmarks/generation.py --task gsm8k --model gemma --data FOLDER        # Gemma-3-270M
    python examples/benchmarks/generation.py --task gsm8k --smoke                            # 2 minutes on 2 CPU cores

The whole of it is work for a GPU, which it uses if there is one; `--steps`, `--batch-size`, `--validation` and `--test`
make it smaller. Rates and seeds are treated as by classification.py, and each run is a line of the file of results.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too
sys.path.append(str(Path(__file__).resolve().parents[1]))

from reproduction.adapters import CONTENDERS
from reproduction.command import a_folder, options, parse, study
from reproduction.generator import Settings, Trials
from reproduction.publish import publish
from reproduction.report import Measure
from reproduction.texts import SPLIT_SEED, TASKS

NAMES = ["lora", "dora", "peft_pissa", "kasa", "pissa", "milora", "sorsa", "lora_xs", "svft_plain"]
GRID = [3e-4, 1e-3, 3e-3]
LOSS = Measure("test_loss", "test loss", digits=3, more_is_better=False)
MEASURES = {
    "e2e": [Measure("test_bleu", "BLEU"), Measure("test_rouge_l", "ROUGE-L", 100), LOSS],
    "gsm8k": [LOSS, Measure("test_exact_match", "exact match, %", 100)],  # the first is what is tested
}


def main() -> None:
    args = parse_args()
    name = f"generation-{args.task}-{args.model.replace('/', '-')}"
    if not args.report:
        measure(args, name)
    publish(args.output, name, MEASURES[args.task])


def parse_args() -> argparse.Namespace:
    parser = options(__doc__, CONTENDERS, NAMES, GRID)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma, a folder or a Hub id")
    parser.add_argument("--data", type=a_folder, help="folder with the data set's own files; made up if left out")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=256, help="that an answer may have")
    parser.add_argument("--validation", type=int, default=256, help="prompts that choose the rate")
    parser.add_argument("--test", type=int, help="prompts to answer, drawn once for all; all if left out")
    return parse(parser, {"steps": 4, "batch_size": 4, "new_tokens": 24, "validation": 8, "test": 4})


def measure(args: argparse.Namespace, name: str) -> None:
    settings = Settings(args.model, args.task, args.rank, args.steps, args.batch_size, new_tokens=args.new_tokens)
    data = TASKS[args.task](args.data, args.validation)
    if args.test:
        data = data._replace(test=random.Random(SPLIT_SEED).sample(data.test, args.test))
    protocol: dict[str, Any] = asdict(settings) | {"test": len(data.test)}
    protocol |= {"data": "its own" if args.data else "made up", "validation": len(data.validation)}
    study(args, name, Trials(settings, data), protocol)


if __name__ == "__main__":
    main()
