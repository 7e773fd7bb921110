"""The same procedure for every contender: a learning rate from one grid by the validation split, then the seeds.

What a run is, is the benchmark's: a `trial` trains one contender at one rate from one seed and answers its figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from contenders import beyond

from .results import Results

TUNING_SEED = 1000  # is never one of the reported seeds
WIDER = 4  # rates beyond the grid, where one at its edge is the best

Trial = Callable[[str, float, int, bool], dict[str, Any]]
"""(contender, rate, seed, whether to score the test split) -> figures, `validation_loss` among them."""


class Study:
    """Runs what `results` does not hold yet."""

    def __init__(self, trial: Trial, results: Results, grid: Sequence[float], wider: int = WIDER) -> None:
        self.trial, self.results, self.grid, self.wider = trial, results, tuple(grid), wider

    def __call__(self, contenders: Iterable[str], seeds: Sequence[int]) -> None:
        """All rates first, then each seed of all contenders, so that an early stop leaves whole seeds."""
        if TUNING_SEED in seeds:
            raise ValueError(f"Seed {TUNING_SEED} chooses the rates, so it cannot be reported too.")
        names = list(contenders)
        rates = {name: self.rate(name) for name in names}
        for seed in seeds:
            for name in names:
                if not any(row["seed"] == seed for row in self.results.of("run", name)):
                    self._run("run", name, rates[name], seed)

    def rate(self, name: str) -> float:
        """The rate of least validation loss on the grid, and beyond it while the best one is at the edge.

        Where there is no choice, nothing is tried.
        """
        if len(self.grid) == 1 and not self.wider:
            return self.grid[0]
        while open_rates := self._open(found := self.found(name)):
            self._run("rate", name, open_rates[0], TUNING_SEED)
        return min(found, key=found.__getitem__)

    def found(self, name: str) -> dict[float, float]:
        """The validation loss of each rate that was tried; one that is not a number counts as infinite."""
        rows = self.results.of("rate", name)
        return {row["rate"]: loss if math.isfinite(loss := row["validation_loss"]) else math.inf for row in rows}

    def _open(self, found: dict[float, float]) -> list[float]:
        missing = [rate for rate in self.grid if rate not in found]
        if missing or len(found) >= len(self.grid) + self.wider:
            return missing
        return [rate for rate in beyond(found) if rate not in found]

    def _run(self, kind: str, name: str, rate: float, seed: int) -> None:
        begun, cpu = time.perf_counter(), time.process_time()
        figures = self.trial(name, rate, seed, kind == "run")
        clocks = {"wall": time.perf_counter() - begun, "cpu": time.process_time() - cpu}
        self.results.add({"kind": kind, "method": name, "rate": rate, "seed": seed, **figures, "seconds": clocks})
        shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, float))
        took = f"{clocks['wall']:.0f} s (CPU {clocks['cpu']:.0f})"
        print(f"{kind} {name} {rate:g} seed {seed}: {shown}; {took}", flush=True)
