"""The figures of an `AdapterReport`."""

from __future__ import annotations

from typing import Any

from .adapters import AdapterReport, ModuleUpdate
from .figures import Column, Figure, bars, heat, spectra
from .ticks import thinned
from .updates import COSINES, INTRUDERS


def figures(report: AdapterReport) -> list[Figure]:
    """All figures of a report that its numbers allow, in reading order."""
    rows = report.rows()
    for row in rows:
        for end in ("top", "bottom") if report.with_base else ():
            row[f"overlap_{end}"] = _mean(row[f"overlap_{end}_left"], row[f"overlap_{end}_right"])
    known = [row for row in rows if row["norm"] is not None]
    found = [_spectra(report), _sizes(rows, report.with_base), *(_beside(rows) if report.with_base else [])]
    if report.against is not None and any(row["cosine"] is not None for row in rows):
        found.append(
            Figure("Against the other adapter", AGAINST, [("cosine", heat(rows, COSINE, [APART], ends=[-1, 1]))])
        )
    return found if known else []


NORM, RELATIVE = Column("norm", "norm of the update"), Column("relative_norm", "norm / norm of W")
RANK = Column("update_rank", "rank of the update", "d")
COSINE, APART = Column("cosine", "cosine", ".3f"), Column("relative_distance", "relative distance")
TOP, BOTTOM = Column("overlap_top", "overlap", ".3f"), Column("overlap_bottom", "overlap", ".3f")
SIDES = [Column("chance_left", "chance, left", ".3f"), Column("chance_right", "chance, right", ".3f")]
BELOW, COUNT = Column("cosine", "largest cosine with W's vectors below"), Column("count", "intruders", "d")
SPECTRA = (
    "The singular values of each module's update, by index, on a scale of powers of ten; a line is a layer, from the "
    "first (blue) to the last (orange). A steep line means that fewer ranks would do; a step, that two parts of "
    "different size make up the update, such as a cut and what was learnt."
)
SIZES = "The Frobenius norm of each module's update{relative}. Light cells are where the adapter does most."
OVERLAP = (
    "How much of the update lies in the space of W's r largest singular vectors (top), and of its r smallest (bottom): "
    "mean squared cosines, over columns and rows. 1: inside it. Updates that know nothing of W have r / m."
)
INTRUDER = (
    "How many of the {count} largest singular vectors of each W + update are unlike all of W's: their largest cosine "
    "is below a limit. Many at 0.5 mean that training has put new, strong directions in (Shuttleworth et al. 2024)."
)
AGAINST = "The cosine between the two adapters' updates of each module: 1, the same direction; 0, nothing in common."


def _mean(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _sizes(rows: list[dict[str, Any]], with_base: bool) -> Figure:
    value, more = (RELATIVE, [NORM, RANK]) if with_base else (NORM, [RANK])
    reading = SIZES.format(relative=", over that of its weight" if with_base else "")
    return Figure("Size of the updates", reading, [("", heat(rows, value, more))])


def _beside(rows: list[dict[str, Any]]) -> list[Figure]:
    panels = [
        ("with W's top", heat(rows, TOP, SIDES, "sqrt", [0, 1])),
        ("with W's bottom", heat(rows, BOTTOM, SIDES, "sqrt", [0, 1])),
    ]
    counts: dict[tuple[str, float], int] = {}
    for row in rows:
        for cosine in COSINES:
            key = (row["kind"], cosine)
            counts[key] = counts.get(key, 0) + (row[f"intruders_{cosine}"] or 0)
    values = [{"kind": kind, "cosine": cosine, "count": count} for (kind, cosine), count in counts.items()]
    return [
        Figure("Overlap with W's singular vectors", OVERLAP, panels),
        Figure("Intruder dimensions", INTRUDER.format(count=INTRUDERS), [("", bars(values, BELOW, COUNT))]),
    ]


def _spectra(report: AdapterReport) -> Figure:
    kinds: dict[str, list[ModuleUpdate]] = {}
    for module in report.modules:
        if module.values is not None and len(module.values):
            kinds.setdefault(module.place.kind, []).append(module)
    depths = [module.place.depth for module in report.modules]
    ends = (min(depths), max(depths))
    return Figure(
        "Spectra of the updates", SPECTRA, [(kind, spectra(_lines(some), ends)) for kind, some in kinds.items()]
    )


def _lines(modules: list[ModuleUpdate]) -> list[dict[str, Any]]:
    return [
        {"module": module.name, "depth": module.place.depth, "i": index + 1, "s": module.values[index].item()}
        for module in modules
        if module.values is not None
        for index in thinned(len(module.values), module.rank)
    ]
