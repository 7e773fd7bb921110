"""What the commands of these benchmarks share: options, their smoke form, and the way from trials to results."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measured import commit, machine, versions
from transformers.utils import logging

from .results import Results
from .study import WIDER, Study, Trial

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "benchmarks"
SMOKE = {"data": None, "methods": ["lora", "kasa"], "seeds": [0, 1], "rates": [3e-3], "wider": 0}


def options(
    description: str | None, known: Iterable[str], usual: Sequence[str], grid: Sequence[float]
) -> argparse.ArgumentParser:
    """A parser of what every benchmark asks; each adds its own, `--data` among them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(known)
    parser.add_argument("--methods", nargs="+", choices=names, default=usual, metavar="METHOD", help=", ".join(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", nargs="+", type=float, default=grid, help="the grid of learning rates")
    parser.add_argument("--wider", type=int, default=WIDER, help="rates beyond the grid, where the best is at its edge")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="two contenders, two seeds, made-up data, a few steps")
    parser.add_argument("--report", action="store_true", help="only write the table and the plot again")
    parser.add_argument("--output", type=Path, help="folder of the file of results; docs/benchmarks if left out")
    return parser


def parse(parser: argparse.ArgumentParser, smoke: Mapping[str, Any]) -> argparse.Namespace:
    """The options given; with `--smoke` those of `smoke` besides what is the same for all, and a new folder."""
    args = parser.parse_args()
    if args.smoke:
        vars(args).update(SMOKE | dict(smoke))
    args.output = args.output or (Path(tempfile.mkdtemp(prefix="reproduction-")) if args.smoke else FOLDER)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return args


def a_file(text: str) -> Path:
    """An option that names a file which is there."""
    return _there(Path(text), Path(text).is_file(), "file")


def a_folder(text: str) -> Path:
    """An option that names a folder which is there."""
    return _there(Path(text), Path(text).is_dir(), "folder")


def _there(path: Path, found: bool, kind: str) -> Path:
    if not found:
        raise argparse.ArgumentTypeError(f"{path}: no such {kind}")
    return path


def study(args: argparse.Namespace, name: str, trials: Trial, protocol: dict[str, Any]) -> None:
    """Runs what `name`.jsonl does not hold yet."""
    about = {"machine": machine(), "versions": versions(), "commit": commit()}
    results = Results(args.output / f"{name}.jsonl", protocol | {"rates": args.rates}, about)
    Study(trials, results, args.rates, args.wider)(args.methods, args.seeds)
