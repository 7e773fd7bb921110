"""What `inspect` answers: a saved adapter as a whole, and its updates one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .measures import effective_rank, stable_rank
from .naming import Place
from .report import Report, listed, plain
from .updates import COSINES, Beside, Between


@dataclass(frozen=True)
class ModuleUpdate:
    """What an adapter does to one weight. What takes the base weight, or another adapter, is None without it.

    Attributes:
        values: the update's singular values above the noise, descending.
        shape: (m, n).
    """

    name: str
    place: Place
    rank: int
    trained: int
    shape: tuple[int, int] | None = None
    values: Tensor | None = field(default=None, repr=False)
    beside: Beside | None = None
    between: Between | None = None

    def row(self) -> dict[str, Any]:
        """The update by itself."""
        m, n = self.shape or (None, None)
        row = {"module": self.name, "kind": self.place.kind, "depth": self.place.depth, "rows": m, "columns": n}
        return row | {"rank": self.rank, "trained": self.trained} | _measured(self.values)


def _measured(values: Tensor | None) -> dict[str, Any]:
    if values is None:
        return dict.fromkeys(("update_rank", "norm", "spectral_norm", "effective_rank", "stable_rank"))
    return {
        "update_rank": len(values),
        "norm": values.norm().item(),
        "spectral_norm": values[0].item() if len(values) else 0.0,
        "effective_rank": effective_rank(values),
        "stable_rank": stable_rank(values),
    }


@dataclass(frozen=True)
class AdapterReport(Report):
    """A saved adapter: what `inspect` returns.

    Attributes:
        facts: path, method, base_model, target_modules, ranks, modules, and how many numbers are `trained` and `stored`
            in how many `bytes` and which `dtypes`; of the adapter as a whole.
        modules: in the model's order if a base was given, else by name.
        with_base: whether a base was given.
        against: the facts of the adapter that it is compared with, if any.
        only: the modules that one of the two has alone.
    """

    facts: dict[str, Any]
    modules: list[ModuleUpdate] = field(repr=False)
    with_base: bool = False
    against: dict[str, Any] | None = None
    only: list[str] = field(default_factory=list, repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a module.

        module, kind, depth: its name, and its place in the model. rows, columns: m and n. rank: r. trained: how many
        numbers. update_rank, norm (Frobenius), spectral_norm, effective_rank, stable_rank: of the update.
        With a base: relative_norm, overlap_top_left, overlap_top_right, overlap_bottom_left, overlap_bottom_right,
        chance_left, chance_right (see `peft_kasa.report.updates.Beside`) and intruders_0.5 ... intruders_0.9.
        With another adapter: cosine, distance, relative_distance, overlap_left, overlap_right (`Between`).
        """
        rows = []
        for module in self.modules:
            row = module.row()
            if self.with_base:
                row |= _flat(module.beside)
            if self.against is not None:
                row |= module.between._asdict() if module.between else dict.fromkeys(Between._fields)
            rows.append(plain(row))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON: the facts, and `rows()`, each with the `values` of the update's spectrum."""
        values = {module.name: None if module.values is None else module.values.tolist() for module in self.modules}
        modules = [row | {"values": values[row["module"]]} for row in self.rows()]
        rest = {"against": self.against, "only_in_one": self.only} if self.against else {}
        return plain({"report": "adapter", **self.facts, **rest, "modules": modules})

    def summary(self) -> str:
        """A few lines: what it is, how large its updates are, and what stands out."""
        facts, ranks = self.facts, listed([str(rank) for rank in self.facts["ranks"]])
        lines = [
            f"{facts['method']} of rank {ranks} in {facts['modules']} modules; {facts['trained']:,} numbers trained, "
            f"{facts['stored']:,} stored in {facts['bytes'] / 1e6:.1f} MB",
            *self._sizes(),
        ]
        if self.with_base and (found := [row["intruders_0.5"] for row in self.rows() if row["intruders_0.5"]]):
            lines.append(f"intruder dimensions (cosine below 0.5): {sum(found)} in {len(found)} modules")
        return "\n".join([*lines, *self._compared()])

    def _sizes(self) -> list[str]:
        rows = self.rows()
        key, what = ("relative_norm", "|update| / |W|") if self.with_base else ("norm", "|update|")
        known = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key])
        lines = []
        if known:
            least, most = known[0], known[-1]
            lines.append(f"{what}: {least[key]:.2g} ({least['module']}) to {most[key]:.2g} ({most['module']})")
        if missing := len(rows) - len(known):
            lines.append(f"{missing} updates follow from the base weights: pass base= to see them")
        return lines

    def _compared(self) -> list[str]:
        if self.against is None:
            return []
        found = [
            module.between.cosine for module in self.modules if module.between and module.between.cosine is not None
        ]
        shown = f"{min(found):.2f} to {max(found):.2f}" if found else "not known"
        lines = [f"against {self.against['path']} ({self.against['method']}): cosines of the updates {shown}"]
        return [*lines, f"in one of the two alone: {listed(self.only)}"] if self.only else lines


def _flat(found: Beside | None) -> dict[str, Any]:
    names = [name for name in Beside._fields if name != "intruders"]
    counts = {f"intruders_{cosine}": found.intruders[cosine] if found else None for cosine in COSINES}
    return {name: getattr(found, name, None) for name in names} | counts
