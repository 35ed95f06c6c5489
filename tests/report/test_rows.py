"""Rows of a comparison over seeds, the front of quality against cost, the tables on disk."""

from __future__ import annotations

import csv
import itertools
import json
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3bsr.report.compare import compare_table, mean_curve, points_of
from m3bsr.report.pareto import LINE, Point, front, pareto_chart, standalone
from m3bsr.report.rows import (
    as_text,
    comparison_row,
    group_runs,
    mean_row,
    quality,
    same_or_complain,
    table_rows,
    write_table,
)


def test_folders_are_grouped_by_name_and_seed() -> None:
    groups = group_runs(["a/bsr.5-s0", "a/full-s0", "a/bsr.5-s1", "b/lr2e-4", "a/last-3-s12"])
    assert {name: [run.name for run in runs] for name, runs in groups.items()} == {
        "bsr.5": ["bsr.5-s0", "bsr.5-s1"],
        "full": ["full-s0"],
        "lr2e-4": ["lr2e-4"],
        "last-3": ["last-3-s12"],
    }
    with pytest.raises(ValueError, match="a/x-s0 and b/x-s0 would both be x-s0"):
        group_runs(["a/x-s0", "b/x-s0"])
    with pytest.raises(ValueError, match="a/x is no seed of x"):
        group_runs(["a/x", "a/x-s0"])


def test_seeds_with_other_settings_are_no_seeds(tmp_path) -> None:
    for name, lr in (("x-s0", 1e-4), ("x-s1", 1e-4), ("x-s2", 2e-4)):
        (tmp_path / name).mkdir()
        config = {"optim": {"lr": lr}, "run": {"seed": name[-1]}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    runs = [tmp_path / f"x-s{i}" for i in range(3)]
    same_or_complain("x", runs[:2])
    with pytest.raises(ValueError, match=r"x-s2 is no seed of x: its optim\.lr is 0\.0002"):
        same_or_complain("x", runs)


def test_settings_of_what_a_run_does_not_have_make_no_other_run(tmp_path) -> None:
    """Defaults of gates and drops changed between two seeds that have no experts and drop nothing."""
    settings = {
        "a-s0": ([], "vmoe", [], 0.7),
        "a-s1": ([], "slots", [], 0.8),
        "b-s0": ([11], "vmoe", [], 0.7),
        "b-s1": ([11], "slots", [], 0.7),
        "c-s0": ([], "vmoe", [3], 0.7),
        "c-s1": ([], "vmoe", [3], 0.8),
        "d-s0": ([], "vmoe", [], 0.7),
        "d-s1": ([11], "vmoe", [], 0.7),
        "e-s0": ([], "vmoe", [], 0.7),
        "e-s1": ([], "vmoe", [3], 0.7),
    }
    for name, (blocks, gate, drops, rate) in settings.items():
        (tmp_path / name).mkdir()
        config = {"moe": {"blocks": blocks, "gate": gate}, "bsr": {"drop_blocks": drops, "keep_rate": rate}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    same_or_complain("a", [tmp_path / "a-s0", tmp_path / "a-s1"])
    fields = {"b": "moe.gate", "c": "bsr.keep_rate", "d": "moe.blocks", "e": "bsr.drop_blocks"}
    for name, field in fields.items():
        with pytest.raises(ValueError, match=f"{name}-s1 is no seed of {name}: its {field} "):
            same_or_complain(name, [tmp_path / f"{name}-s0", tmp_path / f"{name}-s1"])


def test_an_interrupted_run_took_the_time_of_all_its_steps(tmp_path) -> None:
    result = {"step": 4, "wall_s": 3.0, "metrics": {"pets": {"nll": 2.0, "top1": 0.5}}}
    log = [{"kind": "train", "step": 2, "step_ms": 400, "data_wait": 0.2}, {"kind": "val", "step": 2}]
    log.append({"kind": "train", "step": 4, "step_ms": 500, "data_wait": 0.0})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    for timed, expected in ((4, 3.0), (1, 2 * 0.4 / 0.8 + 2 * 0.5)):
        (tmp_path / "result.json").write_text(json.dumps({**result, "step_ms": {"num": timed}}))
        row = comparison_row(tmp_path)
        assert row["wall_s"] == pytest.approx(expected) and row["pets top1"] == 0.5


GROUPS = {
    "full": [{"semseg miou": 0.40, "depth rmse": 1.0}, {"semseg miou": 0.44, "depth rmse": 1.0}],
    "bsr": [{"semseg miou": 0.42, "depth rmse": 0.9}, {"semseg miou": 0.42, "depth rmse": 1.1}],
    "head": [{"semseg miou": 0.21, "depth rmse": 2.0}],
}


def test_delta_m_is_against_the_mean_of_the_reference() -> None:
    rows = table_rows(GROUPS, "full")
    assert quality(rows) == "delta_m"
    assert rows["full"]["delta_m"] == pytest.approx(0.0, abs=1e-12)
    assert rows["bsr"]["delta_m"].values == pytest.approx((5.0, -5.0)) and rows["bsr"]["seeds"] == 2
    assert rows["head"]["delta_m"] == pytest.approx(-75.0) and "seeds" not in rows["head"]
    assert list(rows["bsr"])[:4] == ["seeds", "semseg miou", "depth rmse", "delta_m"]
    assert "delta_m" not in table_rows(GROUPS, "nobody")["bsr"]


def test_one_task_is_its_own_quality() -> None:
    rows = {"a": {"c top1": 0.5, "step_ms": 1.0, "delta_m": 3.0}, "b": {"c top1": 0.6, "step_ms": None}}
    assert quality(rows) == "c top1" and [p.name for p in points_of(rows, "step_ms")] == ["a"]


def test_mean_row() -> None:
    row = mean_row([{"x": 1.0, "y": None, "z": 5.0}, {"x": 2.0, "y": None}])
    assert row["x"] == 1.5 and row["x"].spread == pytest.approx(0.5**0.5)
    assert row["y"] is None and row["z"].values == (5.0,)
    assert mean_row([{"x": 1.0}]) == {"x": 1.0}


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(points, st.sampled_from(["high", "low"]))
def test_front_against_its_definition(pairs, better) -> None:
    every = [Point(str(i), x, y) for i, (x, y) in enumerate(pairs)]
    good = {p: p.quality if better == "high" else -p.quality for p in every}
    found = front(every, better)
    for p in every:
        beaten = any(q.cost <= p.cost and good[q] >= good[p] and (q.cost < p.cost or good[q] > good[p]) for q in every)
        assert (p in found) == (not beaten)
    assert [p.cost for p in found] == sorted(p.cost for p in found)


def test_chart_is_a_picture_with_all_names_in_it() -> None:
    every = [Point("<a>", 1, 0.5, 0.01, 0), Point("b", 2, 0.4, 0.0, 1), Point("c", 9, 0.52, 0.02, 13)]
    for better in ("high", "low"):
        svg = ElementTree.fromstring(standalone(pareto_chart(every, cost="MB", quality="top1", better=better)))
        texts = [e.text for e in svg.iter() if e.tag.endswith("text")]
        assert {"<a>", "b", "c", "MB"} <= set(texts)
        y = {e[0].text.split(":")[0]: float(e.get("cy")) for e in svg.iter() if e.tag.endswith("circle")}
        assert (y["c"] < y["<a>"] < y["b"]) == (better == "high")
    assert pareto_chart(every[:1], cost="MB", quality="top1") == ""


def test_equal_points_do_not_hide_each_others_names() -> None:
    svg = ElementTree.fromstring(pareto_chart([Point(n, 5, 0.5) for n in "abc"], cost="MB", quality="top1"))
    names = [e for e in svg.iter() if e.tag.endswith("text") and e.text in "abc"]
    places = [(float(e.get("x")), float(e.get("y"))) for e in names]
    assert len(places) == 3
    for (x, y), (other_x, other_y) in itertools.combinations(places, 2):
        assert abs(y - other_y) >= LINE or abs(x - other_x) > 6  # a line apart, or a letter to the side


def test_tables_on_disk_and_on_the_terminal(tmp_path) -> None:
    rows = table_rows(GROUPS, "full")
    write_table(tmp_path / "out", rows, reference="full")
    with (tmp_path / "out" / "table.csv").open() as file:
        read = {row["run"]: row for row in csv.DictReader(file)}
    assert float(read["full"]["semseg miou"]) == pytest.approx(0.42) and read["head"]["seeds"] == ""
    assert float(read["full"]["semseg miou std"]) == pytest.approx(0.02 * 2**0.5)
    data = json.loads((tmp_path / "out" / "table.json").read_text())
    assert data["reference"] == "full" and data["rows"]["bsr"]["depth rmse"]["values"] == [0.9, 1.1]
    lines = as_text(rows).splitlines()
    assert len(lines) == 4 and "0.4200 ± 0.028" in lines[1] and lines[3].split()[1] == "-"


def test_table_of_the_page_names_the_fronts() -> None:
    rows = {
        "full": {"c top1": 0.9, "measured_peak_mb": 100.0, "step_ms": 10.0},
        "bsr": {"c top1": 0.9, "measured_peak_mb": 50.0, "step_ms": 11.0},
        "bad": {"c top1": 0.1, "measured_peak_mb": 60.0, "step_ms": 12.0},
    }
    text = compare_table(rows)
    assert re.findall(r">([MTG ]*)</td>", text) == ["T", "M", ""] and "front (M T G)" in text


def test_mean_curve_has_the_steps_that_all_seeds_have() -> None:
    assert mean_curve([[(1, 1.0), (2, 3.0)], [(2, 5.0), (3, 1.0)]]) == [(2, 4.0)]
