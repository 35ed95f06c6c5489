"""Predicted peaks over the grid; all of it is a slow test."""

from __future__ import annotations

import json

import pytest

from m3bsr.cli import cost_grid
from m3bsr.cli.cost_grid import cases, compare, main
from m3bsr.cli.measure_cost import main as measure_cost

QUICK = {(config.model.backbone, name, config.train.precision): config for name, config in cases(quick=True)}
NAMES = ("BSR .5", "BSR .7, restored", "BSR .7, restored, both", "multilevel, BSR .5")
SOME = [key for key in QUICK if key[1] in NAMES and key[2] == "fp32"]


@pytest.mark.parametrize("key", SOME, ids=" ".join)
def test_small_models(key: tuple[str, str, str]) -> None:
    row = compare(key[1], QUICK[key])
    assert abs(row.error) < 0.03, row


@pytest.mark.parametrize("name", ["blocks", "BSR .7, restored"])
def test_experts_under_autocast_keep_a_copy_of_their_weights(name: str) -> None:
    row = compare(name, QUICK["m3vit_tiny_patch16", name, "bf16"])
    assert abs(row.error) < 0.05, row


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_whole_grid() -> None:
    rows = [compare(name, config) for name, config in cases()]
    assert len(rows) > 75
    assert [row for row in rows if abs(row.error) > 0.05] == []


def test_command_writes_table_rows_and_plot(tmp_path, capsys, monkeypatch) -> None:
    few = list(cases(quick=True))[12:14]
    monkeypatch.setattr(cost_grid, "cases", lambda **options: iter(few))
    assert main(["--plot", str(tmp_path / "plot.png"), "--json", str(tmp_path / "rows.json")]) == 0
    assert "2 settings: error at most" in capsys.readouterr().out
    assert [row["plan"] for row in json.loads((tmp_path / "rows.json").read_text())] == [name for name, _ in few]
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize("method", ["bsr", "lora:4"])
def test_measure_cost_says_the_predicted_peak(job, capsys, method: str) -> None:
    if method.startswith("lora"):
        pytest.importorskip("peft")
    options = ["--json", "--repeats", "1", "--method", method]
    assert measure_cost([job.config, *options]) == 0
    cost = json.loads(capsys.readouterr().out)
    if method == "bsr":
        assert cost["predicted_peak_bytes"] == pytest.approx(cost["measured_peak_bytes"], rel=0.05)
    else:
        assert cost["predicted_peak_bytes"] is None
