"""Reports in a real browser: on a phone and on a desk, dark and light, and under a pointer and a finger."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from base_model import smollm2
from colours import coloured, contrast, ground, luminance, of_style
from screens import FRAMES, TIP, Shown, browser, overlapping, pixels, point_at, shown, texts
from some_reports import each_kind
from transformers import AutoModelForCausalLM

from peft_kasa.report import spectrum

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("screens")]

KINDS = ["weights", "adapter", "smollm2"]
SIZES = {"phone": (390, 844), "desk": (1280, 800)}
SCHEMES = ["dark", "light"]
TOLD = {  # by a tooltip, and in which column of rows()
    "effective rank": "effective_rank",
    "stable rank": "stable_rank",
    "rank that holds 90 %": "rank_90",
    "value at the cut": "cut_value_r8",
    "norm of the update": "norm",
    "norm / norm of W": "relative_norm",
    "cosine": "cosine",
    "relative distance": "relative_distance",
}
MARKS = ".mark-symbol.role-mark path, .mark-rect.role-mark path"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A report by its kind, made when it is asked for."""
    tiny = cache(lambda: each_kind(tmp_path_factory.mktemp("adapters")))
    large = cache(lambda: spectrum(AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)))
    return lambda kind: large() if kind == "smollm2" else tiny()[kind]


@pytest.fixture(scope="module")
def pages(reports: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The file of a kind's page."""
    folder = tmp_path_factory.mktemp("pages")

    @cache
    def path(kind: str) -> Path:
        reports(kind).to_html(folder / f"{kind}.html")
        return folder / f"{kind}.html"

    return path


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def seen(chromium: Any, pages: Any, kind: str, size: str, scheme: str) -> Iterator[Shown]:
    """A page, open: tests of one look share it."""
    with shown(chromium, pages(kind), *SIZES[size], scheme) as found:
        yield found


def a_mark(chart: Any) -> Any:
    """One that can be pointed at, in the middle of those of a chart."""
    marks = chart.locator(MARKS)
    return marks.nth(marks.count() // 2)


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def inside(page: Any) -> bool:
    """Whether the tooltip is on the screen, from side to side."""
    box = page.locator(TIP).bounding_box()
    return bool(box["x"] >= 0 and box["x"] + box["width"] <= page.evaluate("innerWidth"))


def test_a_page_runs_and_asks_for_nothing(seen: Shown) -> None:
    assert seen.errors == []
    assert seen.requests == [seen.page.url]


def test_every_chart_is_drawn(seen: Shown) -> None:
    charts = seen.page.locator(".chart").all()
    assert len(charts) >= 5
    for chart in charts:
        box = chart.locator("svg").bounding_box()
        assert box["width"] > 150
        assert box["height"] > 70
        plot = chart.locator("path.background").first  # without axes and legends
        assert coloured(pixels(plot)) > 0.002, chart.get_attribute("id")


def test_all_is_on_the_screen_and_nothing_on_another(seen: Shown) -> None:
    width = seen.page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    drawn = [text for text in texts(seen.page) if text["chart"]]
    assert len(drawn) > 40
    assert overlapping(drawn) == []
    for text in drawn:
        left, _, right, _ = text["box"]
        assert text["size"] >= 10, text
        assert 0 <= left < right <= width[1], text


def test_colours_follow_the_theme_and_can_be_read(seen: Shown, scheme: str) -> None:
    page = ground(pixels(seen.page))
    assert luminance(page) < 0.05 if scheme == "dark" else luminance(page) > 0.9
    found = texts(seen.page)
    assert len(found) > 200
    for text in found:
        behind = of_style(text["behind"])
        assert contrast(behind, page) < 1.2, text  # a box on the page is of the same theme
        assert contrast(of_style(text["colour"]), behind) >= 4.5, text  # WCAG 2.2, 1.4.3


def test_pointing_at_a_mark_tells_its_module_and_numbers(seen: Shown, reports: Any, kind: str) -> None:
    rows = {row["module"]: row for row in reports(kind).rows()}
    compared = 0
    for chart in seen.page.locator(".chart").all():
        told = point_at(seen.page, a_mark(chart))
        assert told["module"] in rows if "module" in told else told["kind"] in {row["kind"] for row in rows.values()}
        for title in TOLD.keys() & told.keys() if "module" in told else ():
            assert number(told[title]) == pytest.approx(rows[told["module"]][TOLD[title]], rel=0.02, abs=5e-4), told
            compared += 1
        assert inside(seen.page)
    assert compared >= 3


def test_a_finger_does_what_a_pointer_does(chromium: Any, pages: Any) -> None:
    with shown(chromium, pages("adapter"), *SIZES["phone"], "dark", touch=True) as seen:
        for chart in seen.page.locator(".chart").all():
            told = point_at(seen.page, a_mark(chart), tap=True)
            assert "module" in told or "kind" in told
            assert inside(seen.page)
        seen.page.locator("h2").last.tap()
        assert seen.page.locator(TIP).count() == 0
        assert seen.errors == []


def test_a_click_on_a_legend_brings_a_kind_out(chromium: Any, pages: Any) -> None:
    with shown(chromium, pages("weights"), *SIZES["desk"], "light") as seen:
        chart = seen.page.locator("#figure2-0")
        before = pixels(chart)
        chart.locator(".role-legend-symbol path").first.click()
        seen.page.evaluate(FRAMES)
        assert coloured(pixels(chart)) < 0.7 * coloured(before)  # the other kinds are faint


def test_a_click_on_a_heading_sorts(chromium: Any, pages: Any, reports: Any) -> None:
    values = [row["stable_rank"] for row in reports("weights").rows()]
    names = [row["module"] for row in reports("weights").rows()]
    up = [name for _, name in sorted(zip(values, names, strict=True))]
    with shown(chromium, pages("weights"), *SIZES["phone"], "light") as seen:
        for order in (up, up[::-1]):
            seen.page.get_by_role("button", name="stable rank").click()
            assert seen.page.locator("tbody th").all_inner_texts() == order
