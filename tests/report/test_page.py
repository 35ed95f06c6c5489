"""The page as text: escaping, tables, curves, a run folder, runs side by side."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from m3bsr.report import compare_report, comparison_row, run_report
from m3bsr.report.curves import line_chart, tick_label, ticks, training_curves
from m3bsr.report.html import Column, Section, data_uri, heat_map, number, page, table, write_report
from m3bsr.report.panels import heat_picture
from m3bsr.report.routing import routing_pictures
from m3bsr.report.run import duration

LOG = [
    *(
        {"kind": "train", "step": s, "loss": 3.0 / s, "losses": {"semseg": 2.0 / s, "depth": 1.0 / s}, "lr": 1e-4}
        for s in (1, 2, 3, 4)
    ),
    {"kind": "val", "step": 4, "metrics": {"semseg": {"miou": 0.21, "pixel_accuracy": 0.6}, "depth": {"rmse": 0.9}}},
]
COST = {
    "trainable_params": 1234567,
    "total_params": 7654321,
    "forward_gmacs": 1.25,
    "train_step_gmacs": 2.5,
    "saved_bytes_per_sample": 12 * 2**20,
    "state_bytes": 2**20,
    "measured_peak_bytes": 300 * 2**20,
    "step_ms": 123.4,
    "batch_size": 8,
    "device": "cpu",
    "gmacs_by_module": {"": [0.1, 0.2], "heads.depth": [0.3, 0.6]},
}


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "my <run>"
    folder.mkdir()
    config = {
        "data": {"name": "nyud", "image_size": [240, 320], "tasks": ["semseg", "depth"]},
        "model": {"backbone": "m3vit_tiny_patch16"},
        "bsr": {"train_blocks": [7, 11], "drop_blocks": [4, 8], "keep_rate": 0.7},
    }
    result = {
        "step": 4,
        "protocol": "network",
        "metrics": LOG[-1]["metrics"],
        "best": {"step": 4, "metrics": LOG[-1]["metrics"]},
        "parameters": {"trained": 1234567, "total": 7654321},
        "step_ms": {"median": 120.0},
        "wall_s": 75.2,
    }
    for name, data in (("config", config), ("result", result), ("cost", COST)):
        (folder / f"{name}.json").write_text(json.dumps(data))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG) + '{"kind": "tra')
    return folder


def test_report_of_a_run(run_dir) -> None:
    text = run_report(run_dir).read_text()
    for expected in (
        "0.2100",
        "0.9000",
        "300 MB",
        "1.23 M",
        "120 ms",
        "1 min 15 s",
        "Trains blocks 7, 11 and the heads",
    ):
        assert expected in text
    assert "my &lt;run&gt;" in text and "my <run>" not in text
    assert [t for t in re.findall(r"<h2>(.*?)</h2>", text)] == ["Summary", "Metrics", "Curves", "Cost", "Config"]


def test_nothing_is_loaded_from_elsewhere(run_dir) -> None:
    text = run_report(run_dir).read_text()
    assert "http" not in text and "@import" not in text
    assert all(link.startswith(("data:", "#")) for link in re.findall(r'(?:src|href)="([^"]*)"', text))


def test_a_run_that_has_just_begun(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    text = run_report(tmp_path).read_text()
    assert "not written any result yet" in text
    assert "<h2>Cost" not in text and "<h2>Curves" not in text
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        run_report(tmp_path / "nowhere")
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json is no JSON file"):
        run_report(tmp_path)


def test_comparison_marks_the_better_value(run_dir, tmp_path) -> None:
    row = comparison_row(run_dir)
    assert row == {
        "semseg miou": 0.21,
        "depth rmse": 0.9,
        "step_ms": 120.0,
        "measured_peak_mb": 300.0,
        "saved_mb": 12.0,
        "train_step_gmacs": 2.5,
        "trainable_m": 1.234567,
        "wall_s": 75.2,
    }
    worse = {**row, "semseg miou": 0.1, "depth rmse": 1.5, "step_ms": 100.0}
    text = compare_report(tmp_path / "c.html", {"bsr": row, "full": worse}, {"bsr": run_dir}).read_text()
    best = re.findall(r'<td class="num best"[^>]*>([^<]*)<', text)
    assert best == ["0.2100", "0.9000", "100"]
    assert "legend" in text and text.count("<svg") >= 4


def test_text_is_escaped_everywhere() -> None:
    evil = '<script>"x"</script>'
    text = page(evil, [Section(evil, table([Column("a", evil)], [{"a": evil}]), evil)], evil)
    assert text.count("<script>") == 1  # the page's own
    assert "&lt;script&gt;" in text


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch) -> None:
    path = write_report(tmp_path / "report.html", "old", [])
    with pytest.raises(AttributeError):
        write_report(path, "new", [None])  # type: ignore[list-item]
    assert "<title>old</title>" in path.read_text()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (1234567, "1,234,567"),
        (0.21, "0.2100"),
        (123.456, "123.5"),
        (1234.5678, "1,235"),
        (0.0, "0.000"),
        (3e-5, "3e-05"),
        ("text", "text"),
    ],
)
def test_numbers_for_people(value, shown: str) -> None:
    assert number(value) == shown


def test_missing_values_and_ties_are_not_best() -> None:
    text = table([Column("a", "a", "high")], [{"a": 1.0}, {"a": None}, {}])
    assert "best" not in text and text.count("–") == 2
    assert "best" not in table([Column("a", "a", "low")], [{"a": 1.0}, {"a": 1.0}])


def test_pictures_are_png_or_smaller_jpeg() -> None:
    flat = np.zeros((40, 50, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for picture, kind in ((flat, "png"), (noise, "jpeg")):
        head, data = data_uri(picture).split(",")
        assert head == f"data:image/{kind};base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.size == picture.shape[1::-1]


def test_curves_of_a_log() -> None:
    curves = dict(training_curves(LOG))
    assert curves["training loss"] == {"loss": [(1.0, 3.0), (2.0, 1.5), (3.0, 1.0), (4.0, 0.75)]}
    assert curves["semseg: miou"] == {"miou": [(4.0, 0.21)]}
    assert "gradient norm" not in curves
    broken = training_curves([{"kind": "train", "step": 1, "loss": None, "losses": {"depth": float("nan")}}])
    assert broken == []


def test_chart_stays_in_its_frame() -> None:
    svg = line_chart({"a": [(0, -5.0), (10, 7.0)], "empty": [], "b": [(3, 100.0)]})
    assert "var(--c0)" in svg and "var(--c2)" in svg and "var(--c1)" not in svg
    for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg):
        assert 0 <= float(x) <= 420 and 0 <= float(y) <= 224
    assert line_chart({"a": []}) == ""
    assert "<svg" in line_chart({"one": [(5, 3.0)]})


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.017), (-3, 12000), (5, 5), (0, 0), (1e-5, 3e-4)])
def test_ticks_enclose_and_are_round(low: float, high: float) -> None:
    found = ticks(low, high, 4)
    step = found[1] - found[0]
    assert found[0] <= low + 1e-6 * step and found[-1] >= high - 1e-6 * step and 2 <= len(found) <= 7
    assert all(len(tick_label(t)) <= 7 for t in found)
    assert len({tick_label(t) for t in found}) == len(found)


def test_heat_map() -> None:
    text = heat_map({"semseg": [0.5, 0.5], "depth": [1.0, 0.0]}, {"semseg": "100 %"}, "entropy")
    assert text.count("<td") == 4 and ">50<" in text and "100 %" in text and ">entropy<" in text
    named = heat_map({"a": [0.0, 1.0]}, corner="from", columns=["<x>", "y"])
    assert re.findall(r"<th>(.*?)</th>", named) == ["from", "&lt;x&gt;", "y", "a"]


ROUTING = {
    "9": {
        "load": {"semseg": [0.5, 0.5, 0.0], "depth": [0.2, 0.8, 0.0]},
        "entropy": {"semseg": 0.6309, "depth": 0.4555},
        "overlap": {"semseg+depth": 0.7},
        "num_dead": 1,
        "dead": [2],
    }
}


def test_a_run_with_experts_shows_their_load(run_dir) -> None:
    lines = [{**line, "routing": ROUTING} for line in LOG]
    (run_dir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = run_report(run_dir).read_text()
    section = text[text.index('<section id="expert-load">') :]
    section = section[: section.index("</section>")]
    assert "Over the validation set" in section and "<h3>block 9</h3>" in section
    assert " ".join(re.findall(r"<td[^>]*>(\d+)</td>", section)) == "50 50 0 20 80 0 100 70 70 100"
    assert "63 %" in section and "46 %" in section and "dead experts: 1: 2" in section
    assert "entropy: block 9" in section and section.count("<polyline") == 2
    (run_dir / "log.jsonl").write_text(json.dumps(LOG[-1]) + "\n")
    assert "Expert load" not in run_report(run_dir).read_text()


def test_heat_maps_as_pictures() -> None:
    pictures = routing_pictures(ROUTING)
    load, overlap = pictures["routing/load/block 9"], pictures["routing/overlap/block 9"]
    assert load.shape == (32, 48, 3) and overlap.shape == (32, 32, 3) and load.dtype == np.uint8
    assert load[0, 32:].min() == 255  # 0 is white
    assert load[16, 16].tolist() == [8, 48, 107] == overlap[0, 0].tolist()
    assert load[0, 0].tolist() == load[15, 31].tolist() and load[0, 0, 0] > load[16, 16, 0]
    assert (heat_picture(np.zeros((1, 2))) == 255).all()
    assert routing_pictures({}) == {}


def test_durations() -> None:
    assert [duration(s) for s in (7, 75.2, 3 * 3600 + 125)] == ["7 s", "1 min 15 s", "3 h 02 min"]
