"""The page in a real browser: no error, tables sort, pictures load, nothing wider than the window, dark and light."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from m3bsr.report import Collected, Sample, compare_report, run_report
from m3bsr.report.html import Column, Section, page, table
from m3bsr.report.spread import Spread

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
WIDTHS = (1280, 400)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--v=0",
]
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed (apt-get install chromium)")

# Each page sits in frames of the widths of a desk and a phone; a script looks into them and writes what it finds.
OUTER = """<!DOCTYPE html><meta charset="utf-8"><body>{frames}<pre id="found"></pre><script>
// Contrast of a text with what lies behind it, as WCAG 2 defines it.
function parts(colour) {{ return colour.match(/[\\d.]+/g).map(Number); }}
function luminance(colour) {{
  var linear = parts(colour).slice(0, 3).map(function (v) {{
    v /= 255; return v <= 0.04045 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4);
  }});
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}}
function contrast(view, element) {{
  var text = luminance(view.getComputedStyle(element).color), behind = element, colour;
  do {{ colour = view.getComputedStyle(behind).backgroundColor; behind = behind.parentElement; }}
  while (behind && parts(colour)[3] === 0);
  var ground = luminance(colour);
  return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
}}
window.onload = function () {{
  var found = Array.prototype.map.call(document.querySelectorAll("iframe"), function (frame) {{
    var page = frame.contentDocument, root = page.documentElement, tables = page.querySelectorAll("table.sortable");
    var images = Array.prototype.slice.call(page.images);
    function column(table, i) {{
      return Array.prototype.map.call(table.tBodies[0].rows, function (row) {{ return row.cells[i].textContent; }});
    }}
    var table = tables[0], heads = table.tHead.rows[0].cells, last = heads.length - 1;
    heads[last].click(); var up = column(table, last);
    heads[last].click(); var down = column(table, last);
    heads[0].click(); var names = column(table, 0);
    return {{
      width: root.clientWidth, needed: root.scrollWidth, images: images.length,
      broken: images.filter(function (i) {{ return !i.complete || i.naturalWidth === 0; }}).length,
      up: up, down: down, names: names,
      contrast: Math.min.apply(null, Array.prototype.map.call(
        page.querySelectorAll("h1,h2,h3,p,a,th,td,figcaption,summary,.legend span"), function (e) {{
          return e.closest(".heat") ? 21 : contrast(frame.contentWindow, e);
        }})),
      background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      smallest: Math.min.apply(null, Array.prototype.map.call(page.querySelectorAll("p,td,th,figcaption,h2"),
        function (e) {{ return parseFloat(frame.contentWindow.getComputedStyle(e).fontSize); }}))
    }};
  }});
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script></body>"""


def look_at(pages: dict[str, str], folder: Path, dark: bool) -> tuple[dict[tuple[str, int], dict], list[str]]:
    """What the script found, by page and width, and what the console said. One start of the browser for all."""
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page, quote=True)}"></iframe>'
        for page in pages.values()
        for width in WIDTHS
    )
    outer = folder / "outer.html"
    outer.write_text(OUTER.format(frames=frames))
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    profile = [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--window-size=1400,1000"]
    command = [CHROMIUM, *FLAGS, *scheme, *profile, "--dump-dom", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    shutil.rmtree(folder / "profile", ignore_errors=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found.group(1), f"the page's script did not run: {done.stderr[-800:]}"
    keys = [(name, width) for name in pages for width in WIDTHS]
    frames_found = json.loads(html.unescape(found.group(1)))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return dict(zip(keys, frames_found, strict=True)), console


def pictures() -> Collected:
    photo = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    kept = {task: [(4, np.arange(48) % 3 > 0)] for task in ("semseg", "depth")}
    experts = {task: {b: np.arange(48) % 16 for b in (7, 9, 11)} for task in ("semseg", "depth")}
    predictions = {"semseg": photo // 2, "depth": photo // 3}
    sample = Sample("room", photo, predictions, {"depth": photo}, (6, 8), kept, experts, 16)
    load = {b: {"semseg": list(range(16)), "depth": [5] * 16} for b in (7, 9, 11)}
    return Collected((sample, sample), load)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """A report of one run, of two side by side, and a table with a gap."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    metrics = {"semseg": {"miou": 0.3, "pixel_accuracy": 0.61}, "depth": {"rmse": 0.9, "delta1": 0.5}}
    (folder / "config.json").write_text(json.dumps({"data": {"tasks": ["semseg"], "root": "/a/long/path" * 12}}))
    (folder / "result.json").write_text(json.dumps({"step": 9, "metrics": metrics, "wall_s": 12}))
    lines = [{"kind": "train", "step": s, "loss": 1 / s, "losses": {"semseg": 1, "depth": 2}} for s in range(1, 9)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    one = run_report(folder, pictures()).read_text()
    seeds = {n: Spread.of([0.1 * i, 0.1 * i + 0.02]) for i, n in enumerate(("full", "bsr", "a head"))}
    rows = {
        n: {"seeds": 2, "semseg miou": miou, "measured_peak_mb": 300.0 - 700 * miou, "step_ms": 10.0 ** (10 * miou)}
        for n, miou in seeds.items()
    }
    many = {"full": pictures(), "bsr": pictures()}
    two = compare_report(folder / "c.html", rows, {"full": folder, "bsr": folder}, collected=many).read_text()
    gaps = [{"n": "a", "v": 3.0}, {"n": "b", "v": None}, {"n": "c", "v": -20.0}, {"n": "d", "v": 1000.0}]
    three = page("gaps", [Section("gaps", table([Column("n", "n"), Column("v", "v")], gaps))])
    return {"run": one, "compare": two, "gaps": three}


@pytest.fixture(scope="module")
def light(pages, tmp_path_factory):
    return look_at(pages, tmp_path_factory.mktemp("light"), dark=False)


def test_the_console_is_silent(light) -> None:
    assert light[1] == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "compare"])
def test_page_is_readable(light, name: str, width: int) -> None:
    frame = light[0][name, width]
    assert width - 20 <= frame["width"] <= width
    assert frame["needed"] <= frame["width"], "the page scrolls sideways"
    assert frame["images"] >= 8 and frame["broken"] == 0
    assert frame["smallest"] >= 12
    assert frame["contrast"] >= 4.5


@pytest.mark.parametrize("name", ["run", "compare"])
def test_tables_sort(light, name: str) -> None:
    frame = light[0][name, 1280]
    numbers = [float(text.replace(",", "")) for text in frame["up"]]
    assert numbers == sorted(numbers) and len(set(numbers)) > 1
    assert frame["down"] == frame["up"][::-1]
    assert frame["names"] == sorted(frame["names"])


def test_missing_values_sort_to_the_end(light) -> None:
    assert light[0]["gaps", 1280]["up"] == ["-20.00", "3.000", "1,000", "–"]


def test_page_follows_the_readers_colours(pages, light, tmp_path) -> None:
    both = {name: pages[name] for name in ("run", "compare")}
    dark, console = look_at(both, tmp_path, dark=True)
    assert console == []
    for (name, width), frame in dark.items():
        assert frame["contrast"] >= 4.5 and frame["broken"] == 0, (name, width)
        assert frame["needed"] <= frame["width"], (name, width)
    by_day, by_night = (
        max(map(int, re.findall(r"\d+", found["run", 400]["background"])[:3])) for found in (light[0], dark)
    )
    assert by_night < 60 and by_day > 200
