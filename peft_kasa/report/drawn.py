"""The figures of a report, of whichever kind it is, and the style that they share."""

from __future__ import annotations

from typing import Any

import altair as alt

from . import adapter_figures, weight_figures
from .adapters import AdapterReport
from .figures import Figure
from .report import Report
from .weights import SpectrumReport

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', 'DejaVu Sans', sans-serif"
STYLE: dict[str, Any] = {
    "font": FONT,
    "background": None,
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 10,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "gridOpacity": 0.6,
        "domain": False,
        "tickSize": 0,
        "labelPadding": 5,
    },
    "legend": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "symbolStrokeWidth": 2},
    "header": {"labelFontSize": 11},
    "title": {"fontSize": 12, "fontWeight": "normal"},
}


def figures(report: Report) -> list[Figure]:
    """All figures of a report, in reading order."""
    if isinstance(report, SpectrumReport):
        return weight_figures.figures(report)
    assert isinstance(report, AdapterReport)
    return adapter_figures.figures(report)


def spec(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The Vega-Lite specification of a chart in the shared style."""
    alt.data_transformers.disable_max_rows()  # a report holds all that it shows
    found: dict[str, Any] = chart.to_dict()
    return found | {"config": STYLE}
