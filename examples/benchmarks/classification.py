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
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch slows down tenfold where another program needs a core too
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).resolve().parents[1]))

from measured import commit, machine, versions
from reproduction.adapters import CONTENDERS
from reproduction.classifier import REFERENCES, Settings, Trials, minilm
from reproduction.publish import publish
from reproduction.report import Measure
from reproduction.results import Results
from reproduction.sentences import generated, rated
from reproduction.study import WIDER, Study
from transformers.utils import logging

NAMES = ["lora", "dora", "kasa", "pissa", "milora", "sorsa", "lora_xs", "peft_pissa", "head"]
GRID = [3e-3, 1e-2]
VALIDATION, TEST = 256, 1000
MEASURES = [Measure("test_accuracy", "accuracy, %", 100), Measure("test_loss", "loss", digits=3, more_is_better=False)]
FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


def main() -> None:
    args = parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not args.report:
        measure(args)
    publish(args.output, "classification", MEASURES)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*CONTENDERS, *REFERENCES]
    parser.add_argument("--data", type=Path, help="lines of `number TAB rating TAB sentence`; made up if left out")
    parser.add_argument("--methods", nargs="+", choices=known, default=NAMES, metavar="METHOD", help=", ".join(known))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", nargs="+", type=float, default=GRID, help="the grid of learning rates")
    parser.add_argument("--wider", type=int, default=WIDER, help="rates beyond the grid, where the best is at its edge")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--train", type=int, default=480, help="training sentences")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--longest", type=int, default=24, help="tokens; longer sentences are left out")
    parser.add_argument("--head-rate", type=float, help="the head's learning rate; the adapter's if left out")
    parser.add_argument("--smoke", action="store_true", help="two contenders, two seeds, made-up sentences")
    parser.add_argument("--report", action="store_true", help="only write the table and the plot again")
    parser.add_argument("--output", type=Path, help="folder of classification.jsonl")
    args = parser.parse_args()
    if args.data and not args.data.is_file():
        parser.error(f"--data {args.data}: no such file")
    if args.smoke:
        args.data, args.methods, args.seeds, args.rates = None, ["lora", "kasa"], [0, 1], [3e-3]
        args.wider, args.train, args.epochs = 0, 64, 1
    args.output = args.output or (Path(tempfile.mkdtemp(prefix="classification-")) if args.smoke else FOLDER)
    return args


def measure(args: argparse.Namespace) -> Results:
    settings = Settings(minilm(), args.rank, args.train, args.epochs, longest=args.longest, head_rate=args.head_rate)
    held_out = (64, 64) if args.smoke else (VALIDATION, TEST)
    sentences = rated(args.data) if args.data else generated(400 if args.smoke else 3000)
    trials = Trials(settings, sentences, *held_out)
    protocol: dict[str, Any] = asdict(settings) | {"encoder": "all-MiniLM-L6-v2", "rates": args.rates}
    protocol |= {"data": args.data.name if args.data else "made up", "held_out": list(held_out)}
    about = {"machine": machine(), "versions": versions(), "commit": commit()}
    results = Results(args.output / "classification.jsonl", protocol, about)
    Study(trials, results, args.rates, args.wider)(args.methods, args.seeds)
    return results


if __name__ == "__main__":
    main()
