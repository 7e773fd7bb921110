"""The results of a study as a plot: every seed of every contender, and how far each is from LoRA with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from .report import PEER, Line, Measure, comparisons

OURS, THEIRS, PALE = "#3b5b7a", "#b07d62", "#9fb4c7"


def draw(found: Sequence[Line], measure: Measure, ours: Sequence[str], file: Path) -> None:
    """Left: means, seeds as small marks. Right: mean difference to the peer, with its 95 % interval."""
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "peft_kasa"})
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(10, 1.3 + 0.32 * len(found)))
    tested = comparisons(found, measure)
    for place, line in enumerate(found):
        colour = OURS if line.name in ours else THEIRS
        values = list(line.by_seed(measure).values())
        left.plot(values, [place] * len(values), "|", color=PALE, ms=9, mew=2)
        left.plot(line.mean(measure), place, "o", color=colour, ms=6)
        if line.name in tested:
            comparison = tested[line.name][0]
            right.errorbar(comparison.mean, place, xerr=comparison.half_width, fmt="o", color=colour, ms=6, capsize=3)
    right.axvline(0, color="#666666", lw=0.8)
    left.set_xlabel(measure.title)
    peer = next((line.title for line in found if line.name == PEER), PEER)
    right.set_xlabel(f"less {peer}'s over the same seeds, with 95 % interval")
    left.set_yticks(range(len(found)), [line.title for line in found])
    left.invert_yaxis()
    for axes in (left, right):
        axes.grid(color="#e4e4e4", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
