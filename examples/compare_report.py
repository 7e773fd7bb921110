"""What compare_methods.py measured, as a table with a text above it that says where a method loses, and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders import METHODS, Method

PEER = "lora"  # what each method is measured against
NOTABLE = 1.1  # from this factor on, one is said to lose
PLOTTED: list[tuple[str, str, bool]] = [  # an attribute of Line, its title, and whether it is drawn on a log scale
    ("loss", "held-out loss", True),
    ("exact", "held-out orders right, %", False),
    ("general", "loss on other text", False),
    ("trainable", "numbers that learn", True),
    ("checkpoint", "checkpoint, MB", True),
    ("memory", "memory of a step, MB", False),
    ("step", "step, CPU s", False),
    ("start", "start, CPU s", True),
]


@dataclass
class Line:
    """The figures of a method over its seeds."""

    method: Method
    runs: list[dict[str, Any]]
    starts: list[dict[str, float]]
    rates: dict[str, Any]

    def all(self, key: str) -> list[float]:
        """One figure of each seed; a run that ended in NaN counts as infinitely bad."""
        return [float("inf") if run[key] is None else run[key] for run in self.runs]

    def once(self, key: str) -> Any:
        """A figure that no seed changes."""
        return next((run[key] for run in self.runs if key in run), None)

    @property
    def loss(self) -> float:
        return statistics.mean(self.all("loss"))

    @property
    def exact(self) -> float:
        return 100 * statistics.mean(self.all("exact"))

    @property
    def general(self) -> float:
        return statistics.mean(self.all("general_loss"))

    @property
    def trainable(self) -> float:
        return self.once("trainable")

    @property
    def checkpoint(self) -> float:
        return self.once("checkpoint") / 1e6

    @property
    def memory(self) -> float:
        """Adapter, gradients, AdamW's moments, and what the forward pass keeps."""
        return self.held + self.once("saved_for_backward") / 1e6

    @property
    def held(self) -> float:
        return (self.once("adapter_bytes") + self.once("optimizer_bytes")) / 1e6

    @property
    def step(self) -> float:
        return statistics.median(run["step"]["cpu"] for run in self.runs)

    @property
    def step_wall(self) -> float:
        return statistics.median(run["step"]["wall"] for run in self.runs)

    @property
    def start(self) -> float:
        return statistics.median(start["cpu"] for start in self.starts)

    @property
    def start_wall(self) -> float:
        return statistics.median(start["wall"] for start in self.starts)

    @property
    def at_edge(self) -> bool:
        """Whether the best of its learning rates was the least or the greatest."""
        tried = [float(rate) for rate in self.rates["losses"]]
        return self.rates["chosen"] in (min(tried), max(tried))


def report(data: dict[str, Any], folder: Path, plot: bool = False) -> None:
    """Writes compare_methods.md, and prints it and writes compare_methods.svg if `plot`."""
    lines = found(data)
    if not lines:
        return
    text = "\n\n".join([*head(data, lines), *losses(data, lines), table(lines), notes(data, lines)]) + "\n"
    (folder / "compare_methods.md").write_text(text)
    if plot:
        print(text)
        draw(lines, folder / "compare_methods.svg")


def found(data: dict[str, Any]) -> list[Line]:
    """The methods that have run, those with the least loss first."""
    lines = []
    for method in METHODS:
        runs = [run for run in data["runs"] if run["method"] == method.name]
        if runs:
            lines.append(Line(method, runs, data["starts"][method.name], data["rates"][method.name]))
    return sorted(lines, key=lambda line: line.loss)


def head(data: dict[str, Any], lines: list[Line]) -> list[str]:
    """What was done."""
    of, base, machine = data["settings"], data["base"], data["machine"]
    seeds = sorted({run["seed"] for line in lines for run in line.runs})
    card = machine.get("processor") or machine["system"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    untouched = data.get("base_untouched")
    one_base = (
        "The members of the family ran one after another on one loaded base, by `add_adapter`, `set_adapter` and "
    )
    one_base += "`delete_adapter`" + ("; afterwards its weights were the same, bit for bit." if untouched else ".")
    return [
        "# The methods side by side",
        "`python examples/compare_methods.py` makes this page; the figures are in compare_methods.json.",
        f"**The task.** An order written as a sentence becomes a record (`examples/orders.py`), on "
        f"{of['base']} in {of['dtype']}: {of['steps']} steps of batch {of['batch_size']}, about 50 tokens a row, "
        "AdamW, no weight decay, cosine schedule, all linear layers but the head, r = 8 unless the name says "
        "otherwise, other settings as they come (KaSA with `reference_truncation=True`). "
        f"A seed ({', '.join(map(str, seeds))}) sets the training rows and random starts. Judged on the same "
        f"{of['held_out']} orders, whose people and cities no training row names: the loss a token, and the share of "
        "orders whose every token is the most likely one after the right ones before it (teacher-forced: cheaper than "
        "generated answers, and the same for an order that is right to the end). *Other text* is the loss on Python's "
        f"module docstrings: what was forgotten. The base: loss {base['loss']:.2f}, {base['exact']:.0%} right, other "
        f"text {base['general_loss']:.2f}.",
        f"**The learning rate** of each method, PEFT's own included, is the best of three (a middle one, a third of it "
        f"and three times it) after {of['rate_steps']} steps with a seed that is not reported, by the loss on other "
        f"orders; where the least or the greatest won, up to {of['wider']} more beyond it were tried, each a factor of "
        "three further. The same rule for all.",
        f"{one_base} PEFT's LoRA, DoRA and PiSSA each had a base loaded afresh.",
        f"**The machine:** {machine['cores']} shared cores ({card}), other work beside: wall times are what they were, "
        "medians; CPU seconds (both cores together) tell more. "
        f"{versions}, commit {data['commit']}.",
    ]


def losses(data: dict[str, Any], lines: list[Line]) -> list[str]:
    """Where a method loses, in words, from the figures."""
    peer = next((line for line in lines if line.method.name == PEER), None)
    ours = [line for line in lines if line.method.ours]
    points = []
    if peer is not None and ours:
        worse = [line for line in ours if line.loss > peer.loss]
        points += [
            f"Loss: {len(worse)} of {len(ours)} are behind LoRA's {peer.loss:.3f}"
            + (f": {named(worse[::-1], lambda line: f'{line.loss:.3f}')}." if worse else "."),
            compared("Step: more CPU time than LoRA's", ours, peer, "step", "s"),
            compared("Memory of a step: more than LoRA's", ours, peer, "memory", "MB"),
            compared("Checkpoint as saved by default: larger than LoRA's", ours, peer, "checkpoint", "MB"),
            compared("Forgets more than LoRA (loss on other text)", ours, peer, "general", "", 1.0),
        ]
    slowest = sorted(ours, key=lambda line: -line.start)[:6]
    points.append(
        f"Start: the slowest are {named(slowest, lambda line: f'{line.start:.0f} CPU s')}"
        + (f", where LoRA takes {peer.start:.1f}" if peer else "")
        + "; those that start from data wait for the calibration besides (below)."
    )
    base = data["base"]["loss"]
    away = [line for line in lines if abs((line.once("loss_at_start") or base) - base) > 0.01 * base]
    if away:
        away.sort(key=lambda line: -line.once("loss_at_start"))
        points.append(
            f"Does not start at the base model, whose loss is {base:.2f} (by its definition; loss before the first "
            f"step): {named(away, lambda line: format(line.once('loss_at_start'), '.2f'))}."
        )
    edge = [line for line in lines if line.at_edge]
    if edge:
        points.append(
            "The best learning rate was the least or the greatest tried, so a wider search might do better: "
            f"{named(edge, lambda line: format(line.rates['chosen'], 'g'))}."
        )
    mine, theirs = (next((x for x in lines if x.method.name == name), None) for name in ("pissa", "peft_pissa"))
    if mine and theirs:
        points.append(
            f"PiSSA here and in PEFT: loss {mine.loss:.3f} and {theirs.loss:.3f}, start {mine.start:.1f} and "
            f"{theirs.start:.1f} CPU s, step {mine.step:.2f} and {theirs.step:.2f} CPU s, checkpoint "
            f"{mine.checkpoint:.1f} and {theirs.checkpoint:.1f} MB (PEFT's is of use only on a base rewritten anew)."
        )
    if missing := [method.title for method in METHODS if all(method is not line.method for line in lines)]:
        points.append(f"Not measured: {', '.join(missing)}.")
    if max(len(line.runs) for line in lines) == 1:
        points.append("There is one seed only, so no spread is known.")
    points += [f"{name} did not run: {why}" for name, why in data["failed"].items()]
    few = "One short run a seed on one small task: differences of the size of the spread mean nothing."
    return ["## Where a method loses", few + "\n\n" + "\n".join(f"- {point}" for point in points if point)]


def compared(what: str, lines: list[Line], peer: Line, key: str, unit: str, factor: float = NOTABLE) -> str:
    """Those whose figure is larger than the peer's by the factor, the worst first."""
    reference = getattr(peer, key)
    worse = sorted((x for x in lines if getattr(x, key) > factor * reference), key=lambda x: -getattr(x, key))
    if not worse:
        return f"{what} ({reference:.3g} {unit}".rstrip() + "): none."
    return f"{what} ({reference:.3g} {unit}".rstrip() + f"): {named(worse, lambda x: format(getattr(x, key), '.3g'))}."


def named(lines: list[Line], figure: Callable[[Line], str]) -> str:
    return ", ".join(f"{line.method.title} ({figure(line)})" for line in lines)


def table(lines: list[Line]) -> str:
    """A row a method, the least loss first."""
    columns = ["method", "learns", "checkpoint, MB", "the other way", "start, s (CPU)", "step, s (CPU)"]
    columns += ["memory, MB", "rate", "loss", "right, %", "other text"]
    rows = ["## The figures", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    seeds = max(len(line.runs) for line in lines)
    for line in lines:
        other = line.once("checkpoint_other")
        different = other is not None and abs(other - line.once("checkpoint")) > 0.02 * line.once("checkpoint")
        cells = [
            line.method.title + (f" ({len(line.runs)} of {seeds} seeds)" if len(line.runs) < seeds else ""),
            f"{line.trainable:,}",
            f"{line.checkpoint:.2f}",
            f"{other / 1e6:.2f}" if different else "-",
            f"{line.start_wall:.1f} ({line.start:.1f})",
            f"{line.step_wall:.2f} ({line.step:.2f})",
            f"{line.held:.0f} + {line.once('saved_for_backward') / 1e6:.0f}",
            f"{line.rates['chosen']:g}",
            spread(line.all("loss"), 3),
            spread([100 * value for value in line.all("exact")], 0),
            spread(line.all("general_loss"), 2),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def notes(data: dict[str, Any], lines: list[Line]) -> str:
    """What the columns mean, and the calibration."""
    calibrated = [
        f"| {what} | {', '.join(line.method.title for line in lines if line.method.statistics == what)} | "
        f"{seen['sequences']} | {seen['wall']:.1f} ({seen['cpu']:.1f}) | {seen['bytes'] / 1e6:.0f} |"
        for what, seen in data["calibration"].items()
    ]
    text = [
        "*Checkpoint*: as saved by default, and *the other way* with the other value of `save_frames` (`-`: there is "
        "nothing to leave out, or it may not be left out). *Start*: `add_adapter`; for PEFT's own `get_peft_model`; no "
        "cache; statistics are read from their file. *Memory* is counted in tensors, since the resident memory of a "
        "process that runs many methods tells little: adapter, gradients and moments + what one forward pass over the "
        "longest batch keeps for the backward pass. ± is the standard deviation over seeds.",
        "*Calibration*, once for all seeds and methods, in a file:",
        "\n".join(["| what | for | sequences | s (CPU) | file, MB |", "|---|---|---|---|---|", *calibrated]),
        "CorDA's knowledge mode and LoRA-Null are meant to keep what the calibration text holds, so theirs is general "
        "text, not the task's.",
    ]
    acting = [
        f"{line.method.title} {run['penalty_gradient']:.1e}"
        for line in lines
        for run in line.runs[:1]
        if "penalty_gradient" in run
    ]
    if acting:
        text.append(
            "The regularisers acted: with a loss that gave none, `optimizer.step` still found a gradient, of norm "
            f"{', '.join(acting)}."
        )
    return "\n\n".join([*text, "![The same figures, drawn](compare_methods.svg)"])


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def draw(lines: list[Line], file: Path) -> None:
    """A panel a measure, a row a method; the small marks are the seeds."""
    try:
        from matplotlib import pyplot as plt
        from matplotlib.ticker import NullFormatter
    except ImportError:
        print("matplotlib is not installed: nothing is drawn")
        return
    plt.rcParams.update({"font.size": 8, "svg.hashsalt": "peft_kasa"})
    figure, panels = plt.subplots(1, len(PLOTTED), sharey=True, figsize=(15, 1.4 + 0.24 * len(lines)))
    places = range(len(lines))
    colours = ["#3b5b7a" if line.method.ours else "#b07d62" for line in lines]
    seeds = {"loss": ("loss", 1), "exact": ("exact", 100), "general": ("general_loss", 1)}
    for axes, (key, title, log) in zip(panels, PLOTTED, strict=True):
        axes.scatter([getattr(line, key) for line in lines], places, c=colours, s=26, zorder=3, clip_on=False)
        if key in seeds:
            name, factor = seeds[key]
            for place, line in enumerate(lines):
                values = [factor * value for value in line.all(name)]
                axes.plot([min(values), max(values)], [place, place], color="#9fb4c7", lw=2.5, zorder=2)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(left=0 if key != "general" else None)
        axes.set_title(title, fontsize=8)
        axes.grid(color="#e4e4e4", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(list(places), [line.method.title for line in lines])
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
