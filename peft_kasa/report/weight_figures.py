"""The figures of a `SpectrumReport`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .figures import Column, Figure, bands, by_layer, heat, spectra
from .measures import energies
from .ticks import thinned
from .weights import ModuleSpectrum, SpectrumReport


def figures(report: SpectrumReport) -> list[Figure]:
    """All figures of a report, in reading order."""
    rank, rows = report.marked, report.rows()
    for row in rows:
        row["share"] = row["effective_rank"] / min(row["rows"], row["columns"])
    effective, stable = Column("effective_rank", "effective rank", ".0f"), Column("stable_rank", "stable rank", ".3~g")
    cut, value = (
        Column(f"cut_energy_r{rank}", "share of energy", ".2~p"),
        Column(f"cut_value_r{rank}", "value at the cut"),
    )
    budget, ninety = Column(f"budget_r{rank}", "rank", "d"), Column("rank_90", "rank that holds 90 %", "d")
    share = Column("share", "effective rank / min(m, n)", ".0%")
    return [
        Figure("Singular values", SPECTRA.format(rank=rank), _panels(report)),
        Figure("Energy held by rank", ENERGY, [("", bands(_held(report), RANK, HELD, "low", "high"))]),
        Figure("What KaSA's cut takes", CUT.format(rank=rank), [("", by_layer(rows, cut, [value], log=True))]),
        Figure("Effective rank", EFFECTIVE, [("", heat(rows, share, [effective, stable]))]),
        Figure("Ranks by budget", BUDGET.format(rank=rank), [("", heat(rows, budget, [ninety]))]),
    ]


RANK, HELD = Column("rank", "rank", "d"), Column("held", "energy", ".3~p")
SPECTRA = (
    "Every singular value of each weight, by index, on a scale of powers of ten; a line is a layer, from the first "
    "(blue) to the last (orange). The red band is what KaSA takes out at r = {rank}. A line that falls steeply into it "
    "loses little; one that is still high there loses something that the model uses."
)
ENERGY = (
    "The share of the squared Frobenius norm that the largest triples hold, by their number: the mean of each kind, "
    "and the range of its layers. A line that rises early belongs to weights that a low rank describes well."
)
CUT = (
    "The share of the squared norm in the {rank} smallest triples, which KaSA takes out before training, by layer, on "
    "a scale of powers of ten. Kinds far above the others are those to spare: see reference_truncation."
)
EFFECTIVE = (
    "The effective rank (Roy & Vetterli 2007) as a share of the largest that the shape allows. Light cells have flat "
    "spectra; in dark ones few directions dominate."
)
BUDGET = (
    'The ranks that rank_budget="variance" gives with r = {rank} as their mean: more to weights whose energy is in few '
    "triples."
)


def _panels(report: SpectrumReport) -> list[tuple[str, Any]]:
    kinds: dict[str, list[ModuleSpectrum]] = {}
    for module in report.modules:
        kinds.setdefault(module.place.kind, []).append(module)
    depths = [module.place.depth for module in report.modules]
    return [
        (_label(kind, some), _panel(some, report.marked, (min(depths), max(depths)))) for kind, some in kinds.items()
    ]


def _label(kind: str, modules: list[ModuleSpectrum]) -> str:
    shapes = {module.shape for module in modules}
    return f"{kind} ({' × '.join(map(str, shapes.pop()))})" if len(shapes) == 1 else kind


def _panel(modules: list[ModuleSpectrum], rank: int, depths: tuple[int, int]) -> Any:
    rows = [
        {"module": module.name, "depth": module.place.depth, "i": index + 1, "s": module.values[index].item()}
        for module in modules
        for index in thinned(len(module.values), rank)
        if module.values[index] > 0
    ]
    size = max(len(module.values) for module in modules)
    alike = all(len(module.values) == size for module in modules)
    return spectra(rows, depths, (size - rank + 0.5, size + 0.5) if alike and rank < size else None)


def _held(report: SpectrumReport) -> list[dict[str, Any]]:
    held: dict[tuple[str, int], list[float]] = {}
    for module in report.modules:
        shares = energies(module.values).cumsum(0)
        for rank in _powers(shares):
            held.setdefault((module.place.kind, rank), []).append(shares[rank - 1].item())
    return [
        {"kind": kind, "rank": rank, "held": sum(some) / len(some), "low": min(some), "high": max(some)}
        for (kind, rank), some in held.items()
    ]


def _powers(shares: Tensor) -> list[int]:
    """Powers of two up to the size, and the size."""
    size = len(shares)
    return sorted({2**power for power in range(size.bit_length())} | {size})
