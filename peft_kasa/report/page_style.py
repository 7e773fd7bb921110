"""How a report's page looks, and the few lines of script that it needs besides the plotting library."""

from __future__ import annotations

# Vega writes colours as attributes, which style sheets overrule: so text and grids follow the theme.
CSS = """
:root { --page: #ffffff; --ink: #1c2126; --soft: #58626c; --line: #d8dde2; --fill: #f4f6f8; --link: #1f63b8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e6e9ec; --soft: #a2acb5; --line: #343b42; --fill: #1d2226; --link: #7fb2f0; }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 8px 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 4px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 72ch; }
.summary { background: var(--fill); border-radius: 8px; padding: 12px; margin: 0; list-style: none; }
.summary li { font-size: 0.9rem; padding-left: 1em; text-indent: -1em; overflow-wrap: anywhere; }
.summary .within { margin-left: 1em; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(165px, 100%), 1fr)); gap: 14px 10px; }
@media (min-width: 800px) { .panels { grid-template-columns: repeat(auto-fill, minmax(235px, 1fr)); } }
.panels.wide { grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 0.8rem; color: var(--soft); overflow-wrap: anywhere; }
.chart { width: 100%; }
.chart svg { display: block; max-width: 100%; }
.chart svg text { fill: var(--ink); }
.chart .role-axis-label text, .chart .role-axis-title text, .chart .role-legend-label text { fill: var(--soft); }
.chart .role-axis-grid line { stroke: var(--line); }
.chart .role-axis-tick line, .chart .role-axis-domain line { stroke: var(--soft); }
#vg-tooltip-element { background: var(--fill) !important; color: var(--ink) !important;
  border-color: var(--line) !important; max-width: 90vw; overflow-wrap: anywhere; pointer-events: none; }
#vg-tooltip-element table tr td.key { color: var(--soft) !important; }
#vg-tooltip-element td { white-space: normal; }
/* Vega puts it beside the pointer, which on a phone is often past the edge. */
@media (max-width: 600px) { #vg-tooltip-element { left: 5vw !important; } }
.scroll { overflow-x: auto; max-height: 75vh; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th[scope=row], thead th:first-child { text-align: left; }
th[scope=row] { font-weight: normal; }
thead th { position: sticky; top: 0; background: var(--fill); }
thead button { all: unset; cursor: pointer; font-weight: 600; white-space: nowrap; }
thead button:focus-visible, .scroll:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
footer { margin: 32px 0 8px; font-size: 0.8rem; color: var(--soft); }
"""

SCRIPT = """
for (const place of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent);
  window.vegaEmbed(place, spec, { actions: false, renderer: "svg", tooltip: { theme: "custom" } });
}
const hide = () => document.getElementById("vg-tooltip-element")?.classList.remove("visible");
addEventListener("scroll", hide, { passive: true });
document.addEventListener("click", (event) => {
  hide();  // and show again what a finger points at: a tap moves no pointer, which is what Vega waits for
  if (event.target.closest(".chart")) event.target.dispatchEvent(new PointerEvent("pointermove", event));
});
const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
const compare = (a, b) => {
  if (a === "" || b === "") return a === b ? 0 : a === "" ? 1 : -1;
  return isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b;
};
for (const head of document.querySelectorAll("thead th")) {
  head.querySelector("button").addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], up = head.ariaSort !== "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].sort((a, b) => {
      const order = compare(value(a, head.cellIndex), value(b, head.cellIndex));
      return up ? order : -order;
    });
    body.append(...rows);
  });
}
"""
