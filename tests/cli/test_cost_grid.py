"""Predicted peaks over the grid; all of it is a slow test."""

from __future__ import annotations

import json

import pytest

from m3bsr.cli import cost_grid
from m3bsr.cli.cost_grid import cases, compare, main
from m3bsr.cli.measure_cost import main as measure_cost
from m3bsr.methods import METHODS

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


def test_the_grid_has_every_method() -> None:
    found = {config.model.method.partition(":")[0] for _, config in cases()} | {name for name, _ in cases()}
    assert found >= METHODS.keys()


def test_only_some(capsys) -> None:
    assert main(["--quick", "--only", "no such model"]) == 2
    assert "--only no such model: no setting is called so" in capsys.readouterr().err
    assert main(["--quick", "--only", "vit norm b2 fp32"]) == 2
    assert main(["--quick", "--only", "deit_tiny_patch16_224 norm b2 fp32"]) == 0
    assert "1 settings: error at most" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_whole_grid() -> None:
    rows = [compare(name, config) for name, config in cases()]
    assert len(rows) > 130
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
    assert cost["predicted_peak_bytes"] == pytest.approx(cost["measured_peak_bytes"], rel=0.05)
