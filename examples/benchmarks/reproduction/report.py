"""The results of a study as a table with paired tests against LoRA."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .paired import Comparison, compare, holm
from .results import Row

PEER = "lora"


@dataclass(frozen=True)
class Measure:
    """A figure of a run: its key, how it is called and shown, and whether more of it is better."""

    key: str
    title: str
    factor: float = 1.0
    digits: int = 1
    more_is_better: bool = True


@dataclass(frozen=True)
class Line:
    """A contender over its seeds."""

    name: str
    title: str
    rate: float
    at_edge: bool
    runs: Sequence[Row]
    cpu: float

    @property
    def trainable(self) -> int:
        return self.runs[0]["trainable"]

    def by_seed(self, measure: Measure) -> dict[int, float]:
        return {run["seed"]: measure.factor * run[measure.key] for run in self.runs}

    def mean(self, measure: Measure) -> float:
        return statistics.mean(self.by_seed(measure).values())


def lines(rows: Sequence[Row], titles: Mapping[str, str], measure: Measure) -> list[Line]:
    """The contenders that have run, the best first."""
    found = []
    for name in dict.fromkeys(row["method"] for row in rows if row["kind"] == "run"):
        mine = [row for row in rows if row["method"] == name]
        runs = sorted((row for row in mine if row["kind"] == "run"), key=lambda row: row["seed"])
        tried = [row["rate"] for row in mine if row["kind"] == "rate"]
        rate = runs[0]["rate"]
        cpu = statistics.median(run["seconds"]["cpu"] for run in runs)
        at_edge = bool(tried) and rate in (min(tried), max(tried))
        found.append(Line(name, titles[name], rate, at_edge, runs, cpu))
    return sorted(found, key=lambda line: line.mean(measure), reverse=measure.more_is_better)


def comparisons(found: Sequence[Line], measure: Measure) -> dict[str, tuple[Comparison, float]]:
    """Each contender against the peer, with the p-value of its t-test adjusted for all of them."""
    peer = next((line for line in found if line.name == PEER), None)
    others = [line for line in found if peer and line is not peer and len(line.runs) > 1]
    if peer is None or len(peer.runs) < 2:
        return {}
    each = [compare(line.by_seed(measure), peer.by_seed(measure)) for line in others]
    adjusted = holm([comparison.t_test for comparison in each])
    return {line.name: pair for line, pair in zip(others, zip(each, adjusted, strict=True), strict=True)}


def table(found: Sequence[Line], measures: Sequence[Measure]) -> str:
    """A row a contender; the first measure is the one that is tested."""
    tested = comparisons(found, measures[0])
    columns = ["", "learns", "rate", *(measure.title for measure in measures)]
    columns += ["less LoRA's", "t-test p", "Holm", "Wilcoxon p", "seeds"]
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for line in found:
        cells = [line.title, f"{line.trainable:,}", f"{line.rate:g}" + ("*" if line.at_edge else "")]
        cells += [spread(list(line.by_seed(measure).values()), measure.digits) for measure in measures]
        cells += _against(tested.get(line.name), measures[0].digits)
        rows.append(f"| {' | '.join([*cells, str(len(line.runs))])} |")
    return "\n".join(rows)


def _against(tested: tuple[Comparison, float] | None, digits: int) -> list[str]:
    if tested is None:
        return ["-"] * 4
    comparison, adjusted = tested
    difference = f"{comparison.mean:+.{digits}f} ± {comparison.half_width:.{digits}f}"
    return [difference, *(f"{p:.2g}" for p in (comparison.t_test, adjusted, comparison.wilcoxon))]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def tried(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """The validation loss at each rate of each contender."""
    kept = [row for row in rows if row["kind"] == "rate"]
    rates = sorted({row["rate"] for row in kept})
    lines = [f"| | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for name in dict.fromkeys(row["method"] for row in kept):
        losses = {row["rate"]: row["validation_loss"] for row in kept if row["method"] == name}
        cells = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
        lines.append(f"| {titles[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def about(settings: Mapping[str, Any]) -> str:
    """The machine, versions and commit of the first call."""
    machine, versions = settings["machine"], settings["versions"]
    where = machine.get("card") or f"{machine['cores']} cores ({machine['processor']}), {machine['threads']} thread(s)"
    return (
        f"{where}; {', '.join(f'{name} {version}' for name, version in versions.items())}; commit {settings['commit']}."
    )


def place(page: Path, name: str, text: str) -> None:
    """Puts a text between the marks `<!-- name -->` and `<!-- /name -->` of a page.

    Raises:
        ValueError: the page does not have both marks, once each.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = page.read_text()
    if (whole.count(start), whole.count(end)) != (1, 1):
        raise ValueError(f"{page} has to have {start} and {end} once each.")
    head, _, rest = whole.partition(start)
    tail = rest.partition(end)[2]
    page.write_text(f"{head}{start}\n\n{text}\n\n{end}{tail}")
