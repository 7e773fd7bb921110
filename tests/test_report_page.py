"""Reports as pages and pictures: whole, self-contained, with charts that draw, and written whole or not at all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import vl_convert
from colours import contrast, of_hex
from some_reports import adapter, each_kind

from peft_kasa import KaSAConfig, SVFConfig
from peft_kasa.report import inspect
from peft_kasa.report.figures import CUT, DEPTHS, KINDS, Column, heat
from peft_kasa.report.report import Report
from peft_kasa.report.ticks import layer_ticks, log_ticks, thinned

TARGETS = ["0", "2", "4"]
LOADS = {"src", "href", "srcset", "data", "action", "poster", "background"}  # attributes that name what a page fetches


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    return each_kind(tmp_path_factory.mktemp("adapters"))


FIGURES = {
    "weights": ["Singular values", "Energy held by rank", "What KaSA's cut takes", "Effective rank", "Ranks by budget"],
    "files": ["Spectra of the updates", "Size of the updates"],
    "adapter": [
        "Spectra of the updates",
        "Size of the updates",
        "Overlap with W's singular vectors",
        "Intruder dimensions",
        "Against the other adapter",
    ],
}


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[tuple[str, str]] = []
        self.places: list[dict[str, str | None]] = []
        self.specs: dict[str, Any] = {}
        self.texts: dict[str, list[str]] = {}
        self._within: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.fetched += [(tag, name) for name in given if name in LOADS]
        if "chart" in (given.get("class") or ""):
            self.places.append(given)
        if tag not in ("meta", "br"):
            self._within.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        while self._within and self._within.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag, given = self._within[-1] if self._within else ("", {})
        if given.get("type") == "application/json":
            self.specs[str(given["id"])] = json.loads(data)
        self.texts.setdefault(tag, []).append(data)


def page(report: Report, folder: Path) -> tuple[str, Page]:
    report.to_html(folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.mark.parametrize("kind", FIGURES)
def test_a_page_fetches_nothing(kind: str, reports: dict[str, Report], tmp_path: Path) -> None:
    text, found = page(reports[kind], tmp_path)
    assert not found.fetched
    assert "link" not in found.texts
    style = "".join(found.texts["style"])
    assert not re.search(r"url\(|@import", style)
    ours = re.sub(r"(?s)<script type=\"module\">.*?</script>", "", text)
    assert not re.search(r"https?://", ours)  # in the library there are names of formats, which nothing fetches
    assert len(text) < 3_000_000


@pytest.mark.parametrize("kind", FIGURES)
def test_a_page_has_its_charts_and_modules(kind: str, reports: dict[str, Report], tmp_path: Path) -> None:
    report = reports[kind]
    _, found = page(report, tmp_path)
    assert found.texts["h2"] == [*FIGURES[kind], "All modules"]
    modules = [row["module"] for row in report.rows()]
    assert [text for text in found.texts["th"] if text.startswith("model.")] == modules
    assert [place["data-spec"] for place in found.places] == list(found.specs)
    assert len(found.specs) >= len(FIGURES[kind])
    assert set(report.summary().replace("  ", "").splitlines()) <= set(found.texts["li"])


@pytest.mark.parametrize("kind", FIGURES)
def test_charts_draw_their_values_and_tell_them(kind: str, reports: dict[str, Report], tmp_path: Path) -> None:
    _, found = page(reports[kind], tmp_path)
    for name, spec in found.specs.items():
        assert '"tooltip"' in json.dumps(spec), name
        assert spec["width"] == "container"
        drawn = vl_convert.vegalite_to_svg(spec | {"width": 300})
        assert len(re.findall(r'aria-roledescription="(?:point|bar|rect mark|line mark|rect)', drawn)) >= 2, name
        assert "NaN" not in drawn


def test_a_page_follows_the_theme_and_narrow_screens(reports: dict[str, Report], tmp_path: Path) -> None:
    _, found = page(reports["weights"], tmp_path)
    style = "".join(found.texts["style"])
    assert "prefers-color-scheme: dark" in style
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", style)
    assert all(spec["config"]["background"] is None for spec in found.specs.values())


def test_every_colour_is_seen_on_both_pages() -> None:
    """Contrast of at least 3 : 1 (WCAG 2.2, 1.4.11)."""
    for colour in [*KINDS, *DEPTHS, CUT]:
        for ground in ("#ffffff", "#14171a"):
            assert contrast(of_hex(colour), of_hex(ground)) >= 3, (colour, ground)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """A folder's name comes from strangers."""
    name = "<img src=x onerror=alert(1)>&"
    folder = adapter(tmp_path / name, KaSAConfig(r=2, target_modules=["q_proj"]))
    _, found = page(inspect(folder, against=folder), tmp_path)
    assert not found.fetched
    assert "img" not in found.texts
    assert found.texts["h1"] == [f"Adapter {name} (kasa)"]


def test_a_picture_shows_all_figures(reports: dict[str, Report], tmp_path: Path) -> None:
    reports["weights"].to_png(tmp_path / "weights.png", scale=1.0)
    head = (tmp_path / "weights.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(head[i : i + 4], "big") for i in (16, 20))
    assert 700 < width < 1000
    assert height > 5 * 150


def test_a_report_without_updates_is_a_table(tmp_path: Path) -> None:
    report = inspect(adapter(tmp_path / "svf", SVFConfig(target_modules=["q_proj"])))
    _, found = page(report, tmp_path)
    assert found.texts["h2"] == ["All modules"]
    with pytest.raises(ValueError, match="pass base= to inspect"):
        report.to_png(tmp_path / "none.png")


class Failing(Report):
    """A report that breaks when it is drawn."""

    def rows(self) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    to_dict = summary = rows  # type: ignore[assignment]


@pytest.mark.parametrize("way", ["to_html", "to_png"])
def test_files_are_written_whole_or_not_at_all(way: str, reports: dict[str, Report], tmp_path: Path) -> None:
    path = tmp_path / "new" / "report"
    getattr(reports["files"], way)(path)
    before = path.read_bytes()
    with pytest.raises(BaseException):  # noqa: B017, PT011
        getattr(Failing(), way)(path)
    assert path.read_bytes() == before
    folder = tmp_path / "taken"
    (folder / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        getattr(reports["files"], way)(folder)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new", "taken"]
    assert [entry.name for entry in path.parent.iterdir()] == ["report"]


def test_the_library_is_wanted_for_pages_alone() -> None:
    """And the report by who asks for it alone. In a process of its own: here all is imported already."""
    code = """
import sys, torch, peft_kasa
assert "peft_kasa.report" not in sys.modules
from peft_kasa.report import spectrum
assert not {"altair", "vl_convert"} & set(sys.modules)
report = spectrum(torch.nn.Sequential(torch.nn.Linear(4, 3)))
sys.modules["altair"] = None
try:
    report.to_html("never.html")
except ImportError as error:
    assert "pip install 'peft_kasa[report]'" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lines_keep_both_ends_and_the_cut() -> None:
    drawn = thinned(576, 8)
    assert {0, 1, 2, 575, 574, 567, 568} <= set(drawn)
    assert len(drawn) < 60
    assert thinned(3, 8) == [0, 1, 2]


def test_axes_name_values_that_lie_on_them() -> None:
    assert log_ticks([0.002, 3.0]) == [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    assert [value for value in log_ticks([0.6, 4.0]) if 0.6 <= value <= 4] == [1.0, 2.0]
    assert len(log_ticks([1e-20, 1e20])) <= 8
    assert layer_ticks([0, 1]) == [0, 1]
    assert layer_ticks(range(30)) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert (log_ticks([]), layer_ticks([])) == ([], [0])


def test_a_cell_of_several_modules_tells_their_mean() -> None:
    """Experts of one layer; what is not known of one does not count."""
    rows = [
        {"module": f"layers.0.experts.{i}.up", "kind": "up", "depth": 0, "norm": norm, "cosine": cosine}
        for i, (norm, cosine) in enumerate([(1.0, None), (2.0, 0.5), (6.0, 0.7)])
    ]
    chart = heat(rows, Column("norm", "norm"), [Column("cosine", "cosine")]).to_dict()
    assert chart["data"]["values"] == [
        {"module": "layers.0.experts.0.up and 2 more, their mean", "kind": "up", "depth": 0, "norm": 3.0, "cosine": 0.6}
    ]
