"""Pages as a browser shows them: an installed Chromium, what it draws, where texts stand, what pointing tells."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
WITHOUT = (
    "no Chromium: install one (apt install chromium), or name it in the environment variable CHROMIUM; "
    f"looked for {', '.join(NAMES)}"
)
DRAWN = "() => [...document.querySelectorAll('.chart')].every((place) => place.querySelector('svg'))"
FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
TIP = "#vg-tooltip-element.visible"
TEXTS = """() => {
  const alpha = (colour) => Number((colour.match(/rgba\\((.*)\\)/)?.[1] ?? "1").split(",").pop());
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return alpha(colour) > 0 || !element.parentElement ? colour : behind(element.parentElement);
  };
  const held = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const shown = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  const all = [...document.body.querySelectorAll(":not(script, style)")];
  return all.filter((element) => held(element) && shown(element) && element.getAttribute("opacity") !== "0")
    .map((element) => {
      const style = getComputedStyle(element), box = element.getBoundingClientRect(), svg = element.ownerSVGElement;
      return { text: element.textContent.trim(), chart: element.closest(".chart")?.id ?? "",
        colour: svg ? style.fill : style.color, behind: behind(element), size: parseFloat(style.fontSize),
        box: [box.left, box.top, box.right, box.bottom] };
    });
}"""


def chromium() -> str:
    """The path of an installed Chromium; without one the test is skipped, with how to get it."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    return found or pytest.skip(WITHOUT)


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium, without a screen of its own."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path)
        yield started
        started.close()


@dataclass
class Shown:
    """An open page, and what it asked for and complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@contextmanager
def shown(browser: Any, path: Path, width: int, height: int, scheme: str, touch: bool = False) -> Iterator[Shown]:
    """A page, open and drawn, on a screen of this size and theme."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=touch, is_mobile=touch
    )
    found = Shown(context.new_page())
    found.page.on("request", lambda request: found.requests.append(request.url))
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    found.page.on("console", lambda message: found.errors.append(f"{message.type}: {message.text}"))
    found.page.goto(path.as_uri())
    found.page.wait_for_function(DRAWN)
    yield found
    context.close()


def pixels(target: Any, **options: Any) -> np.ndarray:
    """A screenshot of a page or of a part of it, (height, width, 3)."""
    with Image.open(io.BytesIO(target.screenshot(**options))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def texts(page: Any) -> list[dict[str, Any]]:
    """Every text that is to be seen: its colour and what is behind it, its size in pixels, box and chart."""
    found: list[dict[str, Any]] = page.evaluate(TEXTS)
    return found


def overlapping(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of texts of one chart that lie on one another by more than a pixel both ways."""

    def lap(a: list[float], b: list[float]) -> bool:
        return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1

    inside = [text for text in found if text["chart"]]
    pairs = ((a, b) for i, a in enumerate(inside) for b in inside[i + 1 :] if a["chart"] == b["chart"])
    return [(a["text"], b["text"]) for a, b in pairs if lap(a["box"], b["box"])]


def point_at(page: Any, mark: Any, tap: bool = False) -> dict[str, str]:
    """What the tooltip tells where the pointer, or a finger, is on a mark: its lines by their names."""
    mark.scroll_into_view_if_needed()
    page.evaluate(FRAMES)  # scrolling hides the last one
    box = mark.bounding_box()
    where = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    (page.touchscreen.tap if tap else page.mouse.move)(*where)
    tip = page.locator(TIP)
    tip.wait_for(timeout=5000)
    return {
        row.locator("td").nth(0).inner_text(): row.locator("td").nth(1).inner_text() for row in tip.locator("tr").all()
    }
