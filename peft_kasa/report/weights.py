"""`spectrum`: the singular values of a model's weights, and what they say of ranks and of KaSA's cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.budget import allocate
from ..adapter.layer import SpectralLinear
from ..calibration.targets import targets
from ..methods.kasa import KaSAConfig
from ..methods.method import require
from ..spectral.checksum import checksum
from ..spectral.sweep import Job, sweep
from .base_layers import layer_of, weight_of
from .measures import effective_rank, energies, energy, rank_for, singular_values, stable_rank, tail_energy
from .naming import Place, places
from .report import Report, listed, plain

USUAL = 8  # KaSAConfig's r: the cut that charts mark, where it is among the ranks
SHARES = (0.5, 0.9)  # of the energy, for which ranks are suggested
SPREAD = 2  # a budget gives no module more than this times the mean rank, as SpectralConfig.rank_spread


@dataclass(frozen=True)
class ModuleSpectrum:
    """One weight: its name, place and shape (m, n), and all its singular values (min(m, n),), descending, float64."""

    name: str
    place: Place
    shape: tuple[int, int]
    values: Tensor = field(repr=False)

    def cut(self, rank: int) -> Tensor | None:
        """The values of the `rank` smallest triples, which KaSA takes out. None: it would leave nothing."""
        return self.values[len(self.values) - rank :] if rank < len(self.values) else None

    def reference_cut(self, rank: int) -> int | None:
        """How many triples the authors' code takes out (`KaSAConfig.reference_truncation`)."""
        config = KaSAConfig(r=rank, reference_truncation=True)
        return config.leaving(*self.shape, rank) if rank < len(self.values) else None

    def row(self, ranks: Sequence[int]) -> dict[str, Any]:
        """All that is said of the weight."""
        values = self.values
        row = {
            "module": self.name,
            "kind": self.place.kind,
            "depth": self.place.depth,
            "rows": self.shape[0],
            "columns": self.shape[1],
            "norm": torch.linalg.vector_norm(values).item(),
            "largest": values[0].item(),
            "smallest": values[-1].item(),
            "effective_rank": effective_rank(values),
            "stable_rank": stable_rank(values),
        }
        row |= {f"energy_r{rank}": energy(values, rank) for rank in ranks}
        for rank in ranks:
            cut = self.cut(rank)
            row[f"cut_value_r{rank}"] = None if cut is None else cut[0].item()
            row[f"cut_energy_r{rank}"] = None if cut is None else tail_energy(values, rank)
            row[f"reference_cut_r{rank}"] = self.reference_cut(rank)
        return row | {f"rank_{share:.0%}".rstrip("%"): rank_for(values, share) for share in SHARES}


@dataclass(frozen=True)
class SpectrumReport(Report):
    """The spectra of a model's weights: what `spectrum` returns.

    Attributes:
        modules: in the model's order.
        ranks: at which energy and KaSA's cut are given.
    """

    modules: list[ModuleSpectrum] = field(repr=False)
    ranks: tuple[int, ...]

    @property
    def marked(self) -> int:
        """The rank whose cut charts mark: 8 if it is one of the ranks, else the first."""
        return USUAL if USUAL in self.ranks else self.ranks[0]

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a module.

        module, kind, depth: its name, and its place in the model. rows, columns: m and n.
        norm (Frobenius), largest, smallest: of its singular values. effective_rank (Roy & Vetterli 2007), stable_rank.
        energy_r8: the share of the squared norm in the 8 largest triples; so for each of the ranks.
        cut_value_r8, cut_energy_r8: the largest value that KaSA of rank 8 takes out, and the share of the squared norm
        that leaves. reference_cut_r8: how many triples the authors' code takes out there. None: fewer triples than 9.
        rank_50, rank_90: the smallest ranks that hold half and nine tenths of the squared norm.
        budget_r8: what `rank_budget="variance"` with r=8 gives the module (of each of the ranks).
        """
        rows = [module.row(self.ranks) for module in self.modules]
        for rank in self.ranks:
            given = self.budget(rank)
            for row in rows:
                row[f"budget_r{rank}"] = given[row["module"]]
        return [plain(row) for row in rows]

    def budget(self, rank: int) -> dict[str, int]:
        """The rank of each module, by name, where `rank` is their mean: those with the largest shares get the most."""
        shares = {module.name: energies(module.values)[: SPREAD * rank] for module in self.modules}
        return allocate(shares, "variance", rank)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON: `rows()`, each with its singular `values`."""
        values = {module.name: module.values.tolist() for module in self.modules}
        modules = [row | {"values": values[row["module"]]} for row in self.rows()]
        return {"report": "spectrum", "ranks": list(self.ranks), "modules": modules}

    def summary(self) -> str:
        """A few lines: how many weights, their effective ranks by kind, and what KaSA's cut takes."""
        rank, rows = self.marked, self.rows()
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            kinds.setdefault(row["kind"], []).append(row)
        head = f"{len(rows)} weights of {len(kinds)} kinds. Means by kind, KaSA's cut at r = {rank}:"
        lines = [head, *(_line(kind, alike, rank) for kind, alike in kinds.items())]
        whole = [kind for kind, alike in kinds.items() if all(row[f"reference_cut_r{rank}"] == 0 for row in alike)]
        if whole:
            lines.append(f"reference_truncation=True leaves whole: {listed(whole)}")
        return "\n".join(lines)


def _line(kind: str, rows: list[dict[str, Any]], rank: int) -> str:
    def mean(key: str) -> float:
        found = [row[key] for row in rows if row[key] is not None]
        return sum(found) / len(found) if found else float("nan")

    shapes = sorted({f"{row['rows']} x {row['columns']}" for row in rows})
    return (
        f"  {kind} ({listed(shapes, 2)}): effective rank {mean('effective_rank'):.0f}, energy at r = {rank} "
        f"{mean(f'energy_r{rank}'):.1%}, the cut takes {100 * mean(f'cut_energy_r{rank}'):.2g}%"
    )


def spectrum(
    model: nn.Module,
    *,
    ranks: Sequence[int] = (4, 8, 16, 32, 64),
    target_modules: str | Sequence[str] = "all-linear",
    progress: bool | None = None,
) -> SpectrumReport:
    """The singular values of a model's linear weights, all of them, and what follows: see `SpectrumReport.rows`.

    Quantised weights are read one at a time, as they are. The model is not changed. For the values' accuracy see
    `peft_kasa.report.measures.singular_values`.

    Args:
        model: with its weights loaded. Adapters of the family that are on it do not count.
        ranks: at which energy and KaSA's cut are given, each at least 1.
        target_modules: as in `LoraConfig`. "all-linear": all but the head.
        progress: whether to show a bar. None: on a terminal.

    Raises:
        ValueError: a rank below 1, no target, or a weight that is not loaded or not finite: it is named.
        TypeError: a target that is no linear layer.

    Examples:
        >>> import torch
        >>> from peft_kasa.report import spectrum
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
        >>> model[0].weight.data = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> row = spectrum(model, ranks=[1]).rows()[0]
        >>> row["energy_r1"], row["stable_rank"], row["cut_value_r1"]
        (0.8, 1.25, 1.0)
    """
    rule = "ranks has to be whole numbers of at least 1"
    require(len(ranks) > 0 and all(type(rank) is int and rank >= 1 for rank in ranks), rule, ranks)
    chosen = target_modules if isinstance(target_modules, str) else list(target_modules)
    found = targets(model, KaSAConfig(target_modules=chosen))
    layers = {name: layer_of(model, name) for name in found}
    values = _all_values(layers, progress)
    where = places(list(layers))
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    modules = [ModuleSpectrum(name, where[name], shapes[name], values[name]) for name in layers]
    return SpectrumReport(modules, tuple(sorted(set(ranks))))


def _all_values(layers: dict[str, SpectralLinear], progress: bool | None) -> dict[str, Tensor]:
    values, jobs = {}, []
    for name, layer in layers.items():
        shape = (layer.out_features, layer.in_features)
        found = values[name] = torch.zeros(min(shape), dtype=torch.float64)
        work, about = partial(_fill, found, layer), partial(_about, layer)
        jobs.append(Job(name, shape, layer.base.device, work, [found], about))
    sweep(jobs, "singular values", progress=progress)
    return values


@torch.no_grad()
def _fill(values: Tensor, layer: SpectralLinear) -> None:
    values.copy_(singular_values(weight_of(layer)))


def _about(layer: SpectralLinear) -> object:
    return checksum(weight_of(layer))
