"""A report's figures as one light picture."""

from __future__ import annotations

import os
from typing import Any

import altair as alt
import vl_convert

from ..files import replacing
from ..methods.method import require
from .drawn import figures, spec
from .figures import Figure
from .report import Report

WIDTH = 720  # of a figure that stands alone
ACROSS = 4  # panels in a row
GAP = 62  # between panels: axis labels


def write(report: Report, path: str | os.PathLike[str], scale: float = 2.0) -> None:
    """Writes the picture, whole or not at all."""
    content = png(figures(report), scale)
    with replacing(path) as folder, open(os.path.join(folder, os.path.basename(path)), "wb") as file:
        file.write(content)


def png(drawn: list[Figure], scale: float = 2.0) -> bytes:
    """Figures below one another, as PNG."""
    return vl_convert.vegalite_to_png(_whole(drawn), scale=scale)


def svg(drawn: list[Figure]) -> str:
    """Figures below one another, as SVG."""
    return vl_convert.vegalite_to_svg(_whole(drawn))


def _whole(drawn: list[Figure]) -> dict[str, Any]:
    require(bool(drawn), "a picture needs updates to draw: pass base= to inspect", "none that the files alone give")
    whole = alt.vconcat(*map(_figure, drawn)).resolve_scale(color="independent", shape="independent")
    found = spec(whole)
    return found | {"background": "white", "config": found["config"] | {"concat": {"spacing": 26}}}


def _figure(figure: Figure) -> alt.ConcatChart:
    across = min(len(figure.panels), ACROSS)
    width = (WIDTH - GAP * (across - 1)) / across
    panels = [chart.properties(width=width, title=label) for label, chart in figure.panels]
    title = alt.TitleParams(figure.title, fontSize=15, fontWeight="bold", anchor="start", offset=12)
    found = alt.concat(*panels, columns=across, title=title)
    return found.resolve_scale(color="independent", shape="independent", x="independent", y="independent")
