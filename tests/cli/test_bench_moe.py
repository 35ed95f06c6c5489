"""The MoE benchmark at toy size: every variant is timed in every counted round, and the table is printed."""

from __future__ import annotations

import re
from functools import partial

import pytest

from m3bsr.cli import bench_moe


def test_prints_a_ratio_per_backend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_moe, "SIZES", ((20, 16, 16, 4, 2, 1.3),))
    monkeypatch.setattr(bench_moe, "bench_tasks", partial(bench_moe.bench_tasks, image_size=(16, 16)))
    bench_moe.main(["--sizes", "0", "--rounds", "3", "--backends", "grouped", "loop", "--keep-memory", "False"])
    lines = capsys.readouterr().out.splitlines()
    assert "tokens 20, dim 16, width 16, experts 4, top-k 2 (aim 1.3)" in lines
    rows = {line.split()[0]: line for line in lines if "x rows" in line}
    assert list(rows) == ["rows", "wide", "grouped", "loop", "layer"]
    assert "x rows  1.00" in rows["rows"] and "x wide  1.00" in rows["wide"]
    ratios = re.fullmatch(
        r"four tasks in one call / four calls: forward (.*), forward and backward (.*) \(.*", lines[-1]
    )
    assert ratios is not None and all(0 < float(ratio) < 2 for ratio in ratios.groups())


def test_unknown_backend_is_one_line() -> None:
    with pytest.raises(SystemExit, match='unknown backend "groupt"; known: grouped_mm, grouped'):
        bench_moe.main(["--backends", "groupt"])


def test_first_round_is_not_counted() -> None:
    times = bench_moe.bench_size((20, 16, 16, 4, 2), bench_moe.BenchArgs(backends=("grouped",), rounds=4))
    assert {len(values) for values in times.values()} == {3}
