"""Sentence classification with the MiniLM encoder, in the manner of the KaSA paper's GLUE runs; over several seeds.

Every contender has the same rank, and its own learning rate from the same grid, by the loss on validation sentences (a
seed that is not reported; further rates where the best is at an edge). Then each seed: the same training sentences, in
the same order, the same start of the head and the same dropout for all. The epoch is the best one on validation
sentences, the accuracy that of the test sentences.

    python examples/benchmarks/classification.py --data movieReviewSnippets_GroundTruth.txt   # what the docs show
    python examples/benchmarks/classification.py --smoke                                       # made-up data, a minute
    python examples/benchmarks/classification.py --report                                      # table and plot again

The data: docs/benchmarks/reproduction.md. Each run is a line of the file of results; another call goes on from there.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).resolve().parents[1]))

from reproduction.adapters import CONTENDERS
from reproduction.classifier import REFERENCES, Settings, Trials, minilm
from reproduction.command import a_file, options, parse, study
from reproduction.publish import publish
from reproduction.report import Measure
from reproduction.sentences import generated, rated

NAMES = ["lora", "dora", "kasa", "pissa", "milora", "sorsa", "lora_xs", "peft_pissa", "head"]
GRID = [3e-3, 1e-2]
VALIDATION, TEST = 256, 1000
MEASURES = [Measure("test_accuracy", "accuracy, %", 100), Measure("test_loss", "loss", digits=3, more_is_better=False)]


def main() -> None:
    args = parse_args()
    if not args.report:
        measure(args)
    publish(args.output, "classification", MEASURES)


def parse_args() -> argparse.Namespace:
    parser = options(__doc__, [*CONTENDERS, *REFERENCES], NAMES, GRID)
    parser.add_argument("--data", type=a_file, help="lines of `number TAB rating TAB sentence`; made up if left out")
    parser.add_argument("--train", type=int, default=480, help="training sentences")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--longest", type=int, default=24, help="tokens; longer sentences are left out")
    parser.add_argument("--head-rate", type=float, help="the head's learning rate; the adapter's if left out")
    return parse(parser, {"train": 64, "epochs": 1})


def measure(args: argparse.Namespace) -> None:
    settings = Settings(minilm(), args.rank, args.train, args.epochs, longest=args.longest, head_rate=args.head_rate)
    held_out = (64, 64) if args.smoke else (VALIDATION, TEST)
    sentences = rated(args.data) if args.data else generated(400 if args.smoke else 3000)
    trials = Trials(settings, sentences, *held_out)
    protocol: dict[str, Any] = asdict(settings) | {"encoder": "all-MiniLM-L6-v2"}
    protocol |= {"data": args.data.name if args.data else "made up", "held_out": list(held_out)}
    study(args, "classification", trials, protocol)


if __name__ == "__main__":
    main()
