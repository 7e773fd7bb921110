"""The forms that charts of reports take, in Altair: they know of rows, not of what the numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt

from .ticks import layer_ticks, log_ticks

Rows = Sequence[dict[str, Any]]

# Every colour of a line or point is between 3 : 1 and 8 : 1 against white and against the dark page.
KINDS = ["#3b7dd8", "#d9730d", "#0f9d76", "#c2479b", "#8a72d6", "#b08a00", "#d64545", "#6b8291", "#4f9a3a", "#a8663e"]
DEPTHS = ["#3b7dd8", "#8a72d6", "#d6498f", "#d9730d"]  # from the first layer to the last
AMOUNTS = "viridis"
CUT = "#d64545"
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
HEIGHT = 230
SMALL = 130  # of panels that stand side by side


class Figure(NamedTuple):
    """A part of a report: a title, how to read it, and one chart or several small ones, each with its label."""

    title: str
    reading: str
    panels: Sequence[tuple[str, alt.Chart | alt.LayerChart]]


class Column(NamedTuple):
    """A field of rows, with the words that stand for it, and the format of its values."""

    field: str
    title: str
    format: str = ".3~g"


LEGEND = alt.Legend(orient="bottom", columns=4, labelLimit=90, symbolType="circle", symbolOpacity=1)
MODULE = alt.Tooltip("module:N", title="module")
INDEX = alt.Tooltip("i:Q", title="index", format="d")


def heat(rows: Rows, value: Column, more: Sequence[Column] = (), kind: str = "linear", ends: Any = None) -> alt.Chart:
    """A cell for each module, layers across and kinds down, coloured by a value; modules of one cell are averaged.

    Args:
        rows: of the report; those without the value are left white.
        value: what the colour shows.
        more: further values that hovering shows.
        kind: of the scale: "linear", or "sqrt", which shows small differences near 0.
        ends: the least and the largest of the scale. None: those of the values.
    """
    known = [row for row in rows if row[value.field] is not None]
    fields = [value.field, *(column.field for column in more)]
    scale = alt.Scale(scheme=AMOUNTS, type=kind, **({"domain": ends} if ends else {}))
    bar = alt.Legend(
        orient="bottom",
        direction="horizontal",
        gradientLength=170,
        gradientThickness=10,
        titleLimit=300,
        format=value.format,
        tickCount=4,
    )
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    return (
        alt.Chart(_values(_cells(known, fields), ["module", "kind", "depth", *fields]))
        .mark_rect()
        .encode(
            x=alt.X("depth:O", title="layer", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("kind:N", title=None, sort=kinds, axis=alt.Axis(labelLimit=90)),
            color=alt.Color(f"{value.field}:Q", title=value.title, scale=scale, legend=bar),
            tooltip=[MODULE, *(_tip(column) for column in (value, *more))],
        )
        .properties(height=26 * max(len(kinds), 3))
    )


def by_layer(rows: Rows, value: Column, more: Sequence[Column] = (), log: bool = False) -> alt.LayerChart:
    """A line over the layers for each kind. A click on the legend brings one out."""
    known = [row for row in rows if row[value.field] is not None and (row[value.field] > 0 or not log)]
    fields = ["module", "kind", "depth", value.field, *(column.field for column in more)]
    picked = _picked(value)
    scale = alt.Scale(type="log" if log else "linear", nice=not log)
    ticks = {"values": log_ticks([row[value.field] for row in known])} if log else {}
    layers = alt.Axis(values=layer_ticks([row["depth"] for row in known]), format="d")
    base = alt.Chart(_values(known, fields)).encode(
        x=alt.X("depth:Q", title="layer", axis=layers, scale=alt.Scale(nice=False)),
        y=alt.Y(f"{value.field}:Q", title=None, scale=scale, axis=alt.Axis(format=value.format, **ticks)),
        color=_kinds(rows),
        opacity=alt.condition(picked, alt.value(1), alt.value(0.12)),
    )
    points = base.mark_point(filled=True, size=34).encode(
        shape=alt.Shape("kind:N", sort=None, scale=alt.Scale(range=SHAPES), legend=None),
        tooltip=[MODULE, *(_tip(column) for column in (value, *more))],
    )
    return (base.mark_line(strokeWidth=1.2) + points).add_params(picked).properties(height=HEIGHT)


def bands(rows: Rows, x: Column, y: Column, low: str, high: str) -> alt.LayerChart:
    """A line for each kind with the range of its modules around it, over powers of two."""
    picked = _picked(y)
    across = alt.X(
        f"{x.field}:Q", title=x.title, scale=alt.Scale(type="log", base=2, nice=False), axis=alt.Axis(format="d")
    )
    base = alt.Chart(_values(rows, ["kind", x.field, y.field, low, high])).encode(x=across, color=_kinds(rows))
    shown = alt.condition(picked, alt.value(1), alt.value(0.1))
    upright = alt.Y(f"{y.field}:Q", title=None, axis=alt.Axis(format=y.format))
    ranges = [
        alt.Tooltip(f"{name}:Q", title=title, format=y.format) for name, title in ((low, "least"), (high, "most"))
    ]
    band = base.mark_area().encode(
        y=alt.Y(f"{low}:Q", title=None), y2=f"{high}:Q", opacity=alt.condition(picked, alt.value(0.14), alt.value(0.02))
    )
    line = base.mark_line(strokeWidth=1.6).encode(y=upright, opacity=shown)
    points = base.mark_point(filled=True, size=38).encode(
        y=upright,
        opacity=shown,
        shape=alt.Shape("kind:N", sort=None, scale=alt.Scale(range=SHAPES), legend=None),
        tooltip=[alt.Tooltip("kind:N"), _tip(x), _tip(y), *ranges],
    )
    return (band + line + points).add_params(picked).properties(height=HEIGHT)


def spectra(rows: Rows, depths: tuple[int, int], mark: tuple[float, float] | None = None) -> alt.LayerChart:
    """Singular values over their index, a line for each module, coloured by its layer.

    Args:
        rows: of `module`, `depth`, `i` (from 1) and `s`.
        depths: the first and the last layer: the ends of the colours.
        mark: where to shade, from index to index.
    """
    names = list(dict.fromkeys(row["module"] for row in rows))
    places = [{"n": names.index(row["module"]), **row} for row in rows if row["i"] == 1]
    ticks = log_ticks([row["s"] for row in rows])
    scale = alt.Scale(range=DEPTHS, domain=list(depths), interpolate="lab")
    base = alt.Chart(_values([{"n": names.index(row["module"]), **row} for row in rows], ["n", "i", "s"]))
    base = base.transform_lookup(
        "n", alt.LookupData(_values(places, ["n", "module", "depth"]), "n", ["module", "depth"])
    )
    base = base.encode(
        x=alt.X("i:Q", title=None, axis=alt.Axis(format="d", tickCount=4), scale=alt.Scale(nice=False, zero=False)),
        y=alt.Y("s:Q", title=None, scale=alt.Scale(type="log", nice=False), axis=alt.Axis(format="~g", values=ticks)),
        color=alt.Color("depth:Q", scale=scale, legend=None),
    )
    lines = base.mark_line(strokeWidth=0.9, opacity=0.8).encode(detail="n:N")
    points = base.mark_point(filled=True, size=50, opacity=0).encode(  # what hovering finds
        tooltip=[MODULE, INDEX, alt.Tooltip("s:Q", title="singular value", format=".4~g")]
    )
    layers = [lines, points] if mark is None else [_shade(mark), lines, points]
    return alt.layer(*layers).properties(height=SMALL)


def bars(rows: Rows, x: Column, y: Column) -> alt.Chart:
    """Counts of each kind, stacked."""
    return (
        alt.Chart(_values(rows, ["kind", x.field, y.field]))
        .mark_bar()
        .encode(
            x=alt.X(f"{x.field}:O", title=x.title, axis=alt.Axis(labelAngle=0)),
            y=alt.Y(f"{y.field}:Q", title=None, axis=alt.Axis(tickMinStep=1)),
            color=_kinds(rows),
            tooltip=[alt.Tooltip("kind:N"), _tip(x), _tip(y)],
        )
        .properties(height=HEIGHT)
    )


def _shade(mark: tuple[float, float]) -> alt.Chart:
    values = alt.Data(values=[{"from": mark[0], "to": mark[1]}])
    return alt.Chart(values).mark_rect(color=CUT, opacity=0.45).encode(x="from:Q", x2="to:Q")


def _kinds(rows: Rows) -> alt.Color:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    scale = alt.Scale(domain=kinds, range=[KINDS[index % len(KINDS)] for index in range(len(kinds))])
    return alt.Color("kind:N", title=None, scale=scale, legend=LEGEND)


def _picked(value: Column) -> alt.Parameter:
    """The kind that a click on the legend brings out."""
    return alt.selection_point(name=f"picked_{value.field}", fields=["kind"], bind="legend")


def _values(rows: Rows, fields: Sequence[str]) -> alt.Data:
    """The rows as a chart holds them, numbers to four digits: more would only make the file longer."""
    return alt.Data(values=[{field: _short(row[field]) for field in fields} for row in rows])


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _tip(column: Column) -> alt.Tooltip:
    return alt.Tooltip(f"{column.field}:Q", title=column.title, format=column.format)


def _cells(rows: Rows, fields: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each kind and layer: of several modules (experts) the means."""
    held: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        held.setdefault((row["kind"], row["depth"]), []).append(row)
    return [
        {"module": _named(some), "kind": kind, "depth": depth, **{field: _mean(some, field) for field in fields}}
        for (kind, depth), some in held.items()
    ]


def _named(rows: Rows) -> str:
    first = str(rows[0]["module"])
    return first if len(rows) == 1 else f"{first} and {len(rows) - 1} more, their mean"


def _mean(rows: Rows, field: str) -> float | None:
    known = [row[field] for row in rows if row[field] is not None]
    return sum(known) / len(known) if known else None
