"""Paired tests over seeds: a contender and the peer have the same training rows, order, head and dropout in each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Comparison:
    """A contender less the peer over the seeds that both have: mean, half the 95 % interval, p-values."""

    seeds: int
    mean: float
    half_width: float
    t_test: float
    wilcoxon: float


def compare(mine: Mapping[int, float], peers: Mapping[int, float]) -> Comparison:
    """Two-sided paired t-test and exact Wilcoxon signed-rank test of a figure by seed.

    Raises:
        ValueError: fewer than two common seeds.

    Example:
        >>> compare({0: 0.9, 1: 0.8, 2: 0.9}, {0: 0.8, 1: 0.7, 2: 0.7}).seeds
        3
    """
    seeds = sorted(mine.keys() & peers.keys())
    if len(seeds) < 2:
        raise ValueError(f"A paired test needs at least two seeds that both have. Found {seeds}.")
    differences = [mine[seed] - peers[seed] for seed in seeds]
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    half = stats.t.ppf(0.975, len(seeds) - 1) * spread / math.sqrt(len(seeds))
    if not any(differences):
        return Comparison(len(seeds), 0.0, 0.0, 1.0, 1.0)
    if not spread:  # the same difference in each seed
        return Comparison(len(seeds), mean, 0.0, 0.0, wilcoxon(differences))
    return Comparison(len(seeds), mean, half, float(stats.ttest_1samp(differences, 0.0).pvalue), wilcoxon(differences))


def wilcoxon(differences: Sequence[float]) -> float:
    """The exact p-value, by all signs; with n seeds it is at least 2 / 2**n: 0.0625 for five, 0.0078 for eight.

    Rounded, so that equal differences of accuracies tie although their floats differ in the last bit.
    """
    rounded = [round(difference, 9) for difference in differences]
    return float(stats.wilcoxon(rounded, method=stats.PermutationMethod(n_resamples=2**20)).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for that many comparisons (Holm's step-down).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted, least = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = least
    return adjusted
