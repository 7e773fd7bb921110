"""Timing in turns, and rows of what was measured: printed, kept as JSON, and drawn."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
OURS = "peft_kasa"
SLOW, VERY_SLOW = 5.0, 90.0  # seconds: what takes longer runs twice, or once
PACKAGES = ("torch", "peft", "transformers", "bitsandbytes", "scikit-learn", "numpy", "peft_kasa")
COLOURS = ("#3b5b7a", "#9fb4c7", "#d8c9ab", "#b07d62", "#8a9a7b")


@dataclass
class Clock:
    """Seconds of each run: on the wall, and of this process on all its cores."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def times(self, count: int) -> Clock:
        return Clock([t * count for t in self.wall], [t * count for t in self.cpu])


def alternately(
    work: Mapping[str, Callable[[Any], T]], repeats: int, prepare: Callable[[], Any] = lambda: None
) -> tuple[dict[str, Clock], dict[str, T]]:
    """Runs all in turn (A B A B ...): their times, and what each returned last.

    Each run is given what `prepare` makes for it, which is not timed.
    """
    clocks = {name: Clock() for name in work}
    last: dict[str, T] = {}
    for turn in range(repeats):
        for name, run in work.items():
            clock = clocks[name]
            first = clock.wall[0] if turn else 0.0
            if (turn >= 1 and first > VERY_SLOW) or (turn >= 2 and first > SLOW):
                continue
            last.pop(name, None)
            given = prepare()
            wall, cpu = time.perf_counter(), time.process_time()
            last[name] = run(given)
            clock.wall.append(time.perf_counter() - wall)
            clock.cpu.append(time.process_time() - cpu)
    return clocks, last


@dataclass
class Row:
    """One case: what it took and how exact it was, for ours and for each baseline."""

    part: str
    case: str
    clocks: dict[str, Clock]
    errors: dict[str, dict[str, float]]
    gate: dict[str, float] = field(default_factory=dict)  # what ours may be at most
    target: float | None = None  # how many times faster than `versus` ours should be, best by best
    versus: str = ""
    clock: str = "wall"  # which time the target is about

    @property
    def label(self) -> str:
        return f"{self.part}: {self.case}"

    @property
    def baselines(self) -> list[str]:
        return [name for name in self.clocks if name != OURS]

    def ratio(self, baseline: str, clock: str = "wall", of: Callable[[list[float]], float] = min) -> float:
        theirs, ours = (of(getattr(self.clocks[name], clock)) for name in (baseline, OURS))
        return theirs / max(ours, 1e-9)

    def within(self, name: str) -> bool | None:
        """Whether the gate is kept; None where nothing was measured that it is about."""
        found = {key: self.errors[name][key] for key in self.gate if key in self.errors.get(name, {})}
        return all(value <= self.gate[key] for key, value in found.items()) if found else None

    def verdicts(self) -> dict[str, bool | None]:
        fast = self.target is not None and self.ratio(self.versus, self.clock) >= self.target
        return {"gate": self.within(OURS), "target": fast if self.target is not None else None}

    def report(self) -> dict[str, Any]:
        ratios = {
            name: {
                f"{clock} {word}": self.ratio(name, clock, of)
                for clock in ("wall", "cpu")
                for word, of in (("best", min), ("median", statistics.median))
            }
            for name in self.baselines
        }
        more = {"ratios": ratios, "within": {name: self.within(name) for name in self.errors}, "met": self.verdicts()}
        return _rounded(asdict(self) | more | {"measured": time.strftime("%Y-%m-%d %H:%M", time.gmtime())})


def show(row: Row) -> None:
    print(f"\n{row.label}")
    for name in [*row.clocks, *(name for name in row.errors if name not in row.clocks)]:
        line = f"  {name:34}"
        if name in row.clocks:
            wall, cpu = row.clocks[name].wall, row.clocks[name].cpu
            both = (f"{kind} {min(t):8.3f} ({statistics.median(t):.3f})" for kind, t in (("wall", wall), ("CPU", cpu)))
            line += "   ".join(both) + " s   "
        print(line + "  ".join(f"{key} {value:.1e}" for key, value in row.errors.get(name, {}).items()))
    for name in row.baselines:
        figures = [
            f"x {row.ratio(name, clock, of):.1f}" for clock in ("wall", "cpu") for of in (min, statistics.median)
        ]
        print("  {} best, {} median (CPU {}, {}) against {}".format(*figures, name))
    verdicts = row.verdicts()
    words = {True: "met", False: "MISSED", None: "not measured"}
    if row.gate:
        bounds = ", ".join(f"{key} <= {bound:g}" for key, bound in row.gate.items())
        print(f"  gate {bounds}: {words[verdicts['gate']]}")
    if row.target is not None:
        print(f"  target x {row.target:g} ({row.clock}) against {row.versus}: {words[verdicts['target']]}")
    sys.stdout.flush()


def save(rows: list[Row], file: Path, fresh: bool) -> list[dict[str, Any]]:
    """Writes all rows; with those of other cases in the file, unless `fresh` or from another machine or versions."""
    head = {"machine": machine(), "versions": versions()}
    old = json.loads(file.read_text()) if file.is_file() and not fresh else {}
    kept = old.get("rows", []) if all(old.get(key) == value for key, value in head.items()) else []
    found = {f"{row['part']}: {row['case']}": row for row in kept} | {row.label: row.report() for row in rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(head | {"rows": list(found.values())}, indent=1) + "\n")
    return list(found.values())


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    known: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": model or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "mkl": torch.backends.mkl.is_available(),
    }
    if torch.cuda.is_available():
        known["card"] = torch.cuda.get_device_name()
    return known


def commit() -> str:
    """The commit that the working tree is at, "+" after it if the tree differs; "unknown" outside of git."""
    here = Path(__file__).resolve().parent
    found = [
        subprocess.run(["git", *asked], cwd=here, capture_output=True, text=True, check=False)
        for asked in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    ]
    return found[0].stdout.strip() + ("+" if found[1].stdout.strip() else "") or "unknown"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Bars: how many times faster ours is than each baseline; hatched where the baseline misses the accuracy gate."""
    try:
        from matplotlib import pyplot as plt
        from matplotlib.patches import Patch
    except ImportError:
        print("matplotlib is not installed: nothing is drawn")
        return
    rows = [row for row in rows if row["ratios"]]
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    bars = sum(len(row["ratios"]) for row in rows)
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "peft_kasa", "hatch.linewidth": 0.6})
    figure, axes = plt.subplots(figsize=(750 / 72, 1.2 + 0.19 * bars + 0.14 * len(rows)))  # 750 pt are 1000 px
    y, ticks = 0.0, []
    for row in rows:
        top = y - 0.5
        for name, ratios in row["ratios"].items():
            ratio, missed = ratios[f"{row['clock']} best"], row["within"].get(name) is False
            style: dict[str, Any] = {
                "color": colours[name],
                "hatch": "////" if missed else None,
                "edgecolor": "white",
                "lw": 0,
            }
            axes.barh(y, ratio - 1, 0.86, left=1, **style)
            axes.text(max(ratio, 1) * 1.04, y, f"{ratio:.3g}", va="center", color="#333333", fontsize=8)
            if name == row["versus"] and row["target"]:
                for color, width in (("white", 5), ("black", 2)):
                    axes.plot([row["target"]] * 2, [y - 0.5, y + 0.5], color=color, lw=width, solid_capstyle="butt")
            y += 1
        ticks.append(((top + y - 0.5) / 2, row["case"] + (" (CPU time)" if row["clock"] == "cpu" else "")))
        y += 0.7
    axes.set_xscale("log")
    axes.axvline(1, color="#666666", lw=0.8)
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    axes.set_ylim(y - 0.7, -0.8)
    low, high = axes.get_xlim()
    steps = [step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= step <= high]
    axes.set_xticks(steps, [f"× {step:g}" for step in steps])
    axes.minorticks_off()
    axes.set_xlabel("times faster than the baseline (best of each, run in turn)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    patches = [Patch(color=colours[name], label=name) for name in names]
    patches.append(Patch(facecolor="#bbbbbb", hatch="////", edgecolor="white", label="less accurate than the gate"))
    target = plt.Line2D([], [], color="black", lw=2, label="target")
    figure.legend(handles=[*patches, target], loc="upper center", ncol=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / figure.get_figheight()))
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
