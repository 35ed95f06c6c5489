"""The look of a report page, and the few lines of script that sort its tables."""

from __future__ import annotations

COLOURS = 12
"""Colours of series: `--c0`, `--c1` ...; a thirteenth series starts again."""

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #f6f7f9; --card: #ffffff; --text: #1c2330; --soft: #5b6676; --line: #dfe3e9; --accent: #2563c9;
  --good: #e3f3e6; --head: #eef1f5;
  --c0: #2563c9; --c1: #d9622b; --c2: #1f9254; --c3: #8b4fc4;
  --c4: #c2366f; --c5: #8a6d1d; --c6: #138a9c; --c7: #6b7280;
  --c8: #7a3b12; --c9: #4d8f0f; --c10: #d11f2f; --c11: #5a4bd1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #11151c; --card: #1a202a; --text: #e4e8ee; --soft: #98a3b3; --line: #2d3644; --accent: #7aa8f5;
    --good: #1d3a2a; --head: #232b37;
    --c0: #7aa8f5; --c1: #f0935f; --c2: #5cc98b; --c3: #bb8df0;
    --c4: #f07aa6; --c5: #d6b455; --c6: #55c3d4; --c7: #a3adba;
    --c8: #d19a72; --c9: #a4d65e; --c10: #ff7b83; --c11: #a99cff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 20px 16px 60px; }
header { margin: 6px 2px 18px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 10px; }
h3 { font-size: 14px; margin: 18px 0 6px; overflow-wrap: anywhere; }
p { margin: 6px 0 10px; max-width: 75ch; }
.soft, header p, figcaption { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 4px 14px; margin-top: 10px; font-size: 14px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; margin: 0 0 16px;
}
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin-bottom: 12px; }
.card { background: var(--head); border-radius: 8px; padding: 10px 12px; min-width: 0; }
.card b { display: block; font-size: 20px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; margin: 6px 0 10px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 8px; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { background: var(--head); font-weight: 600; white-space: normal; vertical-align: bottom; }
td:first-child, th:first-child { position: sticky; left: 0; }
td:first-child { background: var(--card); }
td.num, th.num { text-align: right; }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 84px; }
td.wrap:first-child { min-width: 130px; }
td.best { background: var(--good); font-weight: 600; }
table.sortable th { cursor: pointer; user-select: none; }
table.sortable th::after { content: " \\2195"; color: var(--soft); font-size: 11px; opacity: .55; }
table.sortable th[aria-sort=ascending]::after { content: " \\2191"; opacity: 1; }
table.sortable th[aria-sort=descending]::after { content: " \\2193"; opacity: 1; }
table.heat td { text-align: center; padding: 4px 6px; min-width: 34px; font-size: 12px; border: 1px solid var(--card); }
table.heat th { padding: 4px 8px; font-size: 12px; }
.pictures { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); }
.pictures.small { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 5px; background: var(--head); }
figcaption { font-size: 12.5px; margin-top: 3px; }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.charts h3 { margin: 0 0 2px; }
svg.chart { display: block; width: 100%; height: auto; }
svg.chart text { fill: var(--soft); font-size: 11px; }
svg.chart polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg.chart .grid { stroke: var(--line); stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; margin: 4px 0 10px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 5px; }
details { margin: 8px 0; }
details > summary { cursor: pointer; color: var(--accent); }
details[open] > summary { margin-bottom: 8px; }
footer { color: var(--soft); font-size: 13px; margin: 0 2px; }
@media (max-width: 520px) {
  main { padding: 12px 8px 40px; }
  section { padding: 12px 12px; border-radius: 8px; }
  h1 { font-size: 20px; }
  .cards { grid-template-columns: 1fr 1fr; }
  .card b { font-size: 17px; }
  .charts { grid-template-columns: 1fr; }
  .pictures { grid-template-columns: 1fr 1fr; gap: 8px; }
  .pictures.small { grid-template-columns: 1fr 1fr 1fr; }
  th, td { padding: 5px 8px 5px 5px; font-size: 13px; }
  svg.chart text { font-size: 12.5px; }
}
"""

# Sorts by the number in data-value where a cell has one, else by its text. A second click turns the order around.
SCRIPT = """
document.querySelectorAll("table.sortable").forEach(function (table) {
  var body = table.tBodies[0];
  Array.prototype.forEach.call(table.tHead.rows[0].cells, function (head, column) {
    head.tabIndex = 0;
    function sort() {
      var up = head.getAttribute("aria-sort") !== "ascending";
      function key(row) {
        var cell = row.cells[column];
        return cell.dataset.value === undefined ? cell.textContent : parseFloat(cell.dataset.value);
      }
      var rows = Array.prototype.slice.call(body.rows).sort(function (a, b) {
        var x = key(a), y = key(b);
        if (typeof x !== typeof y) { return typeof x === "number" ? -1 : 1; }
        var order = typeof x === "number" ? x - y : x.localeCompare(y);
        return up ? order : -order;
      });
      Array.prototype.forEach.call(table.tHead.rows[0].cells, function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      rows.forEach(function (row) { body.appendChild(row); });
    }
    head.addEventListener("click", sort);
    head.addEventListener("keydown", function (event) { if (event.key === "Enter") { sort(); } });
  });
});
"""
