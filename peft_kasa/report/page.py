"""A report as one page that loads nothing: charts, how to read them, and a table."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Any

import vl_convert

from ..files import replacing
from .adapters import AdapterReport
from .drawn import figures, spec
from .figures import Figure
from .page_style import CSS, SCRIPT
from .report import Report

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$css</style>
</head>
<body>
<main>
<h1>$title</h1>
<ul class="summary">$summary</ul>
$sections
<section>
<h2>All modules</h2>
<p>Click a heading to sort.</p>
<div class="scroll" tabindex="0" role="region" aria-label="All modules">$table</div>
</section>
<footer>Made by peft_kasa. This file is whole: it loads nothing.</footer>
</main>
<script type="module">$library</script>
<script type="module">$script</script>
</body>
</html>
""")


def write(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes the page, whole or not at all."""
    content = page(report)
    with replacing(path) as folder, open(os.path.join(folder, os.path.basename(path)), "w", encoding="utf-8") as file:
        file.write(content)


def page(report: Report) -> str:
    """The page."""
    drawn = figures(report)
    return PAGE.substitute(
        title=escape(_title(report)),
        css=CSS,
        summary=_summary(report.summary()),
        sections="\n".join(_section(figure, f"figure{number}") for number, figure in enumerate(drawn)),
        table=_table(report.rows()),
        library=_library() if drawn else "",
        script=SCRIPT,
    )


def _title(report: Report) -> str:
    if not isinstance(report, AdapterReport):
        return "Spectra of the weights"
    name = os.path.basename(os.path.abspath(report.facts["path"]))
    return f"Adapter {name} ({report.facts['method']})"


def _summary(text: str) -> str:
    within = ' class="within"'
    return "".join(f"<li{within if line[:1] == ' ' else ''}>{escape(line.strip())}</li>" for line in text.splitlines())


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed: 0.9 MB of JavaScript, which come with vl-convert."""
    return _inline(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub asks for more


def _inline(text: str) -> str:
    """Script or JSON, in whose strings nothing ends the element that it is in."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _section(figure: Figure, name: str) -> str:
    panels = "\n".join(_panel(label, chart, f"{name}-{i}", figure) for i, (label, chart) in enumerate(figure.panels))
    kind = {1: "single", 2: "panels wide"}.get(len(figure.panels), "panels")
    return (
        f'<section>\n<h2>{escape(figure.title)}</h2>\n<p>{escape(figure.reading)}</p>\n<div class="{kind}">\n{panels}\n'
        "</div>\n</section>"
    )


def _panel(label: str, chart: Any, name: str, figure: Figure) -> str:
    described = f"{figure.title} {label}".strip()
    drawn = spec(chart.properties(width="container", description=described))
    drawn.pop("$schema")
    caption = f"<figcaption>{escape(label)}</figcaption>" if label else ""
    held = _inline(json.dumps(drawn, separators=(",", ":"), allow_nan=False))
    return (
        f'<figure>{caption}<div class="chart" id="{name}" data-spec="{name}-spec"></div>'
        f'<script type="application/json" id="{name}-spec">{held}</script></figure>'
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = [name for name in rows[0] if name not in ("kind", "depth")] if rows else []
    head = "".join(f'<th scope="col"><button type="button">{escape(_words(name))}</button></th>' for name in columns)
    body = "\n".join(f"<tr>{''.join(_cell(row[name]) for name in columns)}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _words(column: str) -> str:
    return column.replace("_r", " r = ") if column.rpartition("_r")[2].isdigit() else column.replace("_", " ")


def _cell(value: Any) -> str:
    """Numbers are sorted by `data-value`, given where it is not what is shown."""
    if isinstance(value, str):
        return f'<th scope="row">{escape(value)}</th>'
    if value is None:
        return '<td data-value="">–</td>'
    shown = f"{value:.3g}" if isinstance(value, float) else f"{value:,}"
    return f'<td data-value="{value}">{shown}</td>' if "," in shown else f"<td>{shown}</td>"
