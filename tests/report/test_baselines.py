"""delta_m against runs that trained one task each: which runs may be baselines, and what is written of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m3bsr.cli import compare_runs
from m3bsr.report.baselines import check_baselines, read_baselines, scores_of

MAIN = {"semseg": "miou", "depth": "rmse"}


def make_run(folder: Path, scores: dict[str, float], seed: int = 0, protocol: str = "network", **changes) -> Path:
    """A finished run as far as tables read it."""
    folder.mkdir(parents=True)
    data = {"name": "nyud", "tasks": list(scores), "image_size": [240, 320], "val_split": "val"}
    config = {"data": data, "train": {"epochs": 8, "batch_size": 8}, "run": {"seed": seed, "dir": str(folder)}}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    metrics = {task: {MAIN[task]: value} for task, value in scores.items()}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps({"metrics": metrics, "protocol": protocol}))
    return folder


@pytest.fixture
def study(tmp_path):
    """Two seeds of everything; delta_m of both/seed: (.44-.40)/.40 and (1.0-.9)/1.0 -> 10 %, and 0 %."""
    for seed, (alone, together) in enumerate((((0.38, 0.9), (0.44, 0.9)), ((0.42, 1.1), (0.40, 1.0)))):
        make_run(tmp_path / f"seg-s{seed}", {"semseg": alone[0]}, seed)
        make_run(tmp_path / f"dep-s{seed}", {"depth": alone[1]}, seed)
        make_run(tmp_path / f"both-s{seed}", {"semseg": together[0], "depth": together[1]}, seed)
    return tmp_path


def compare(study: Path, *names: str, baselines: str = "seg dep", out: str = "out") -> int:
    runs = [str(path) for name in names for path in sorted(study.glob(f"{name}-s*"))]
    bases = [str(path) for name in baselines.split() for path in sorted(study.glob(f"{name}-s*"))]
    argv = [*runs, "--baselines", *bases, "--out", str(study / out), "--rounds", "0", "--pictures", "0"]
    return compare_runs.main(argv)


def test_delta_m_is_against_the_means_of_the_baselines(study, capsys) -> None:
    assert compare(study, "*") == 0  # the baselines are among the runs: they are no rows of their own twice
    printed = capsys.readouterr().out
    assert "trained alone: semseg 0.4 (seeds 0, 1), depth 1 (seeds 0, 1)" in printed
    table = json.loads((study / "out" / "table.json").read_text())
    assert list(table["rows"]) == ["seg", "dep", "both"]
    gain = table["rows"]["both"]["delta_m"]
    assert gain["values"] == pytest.approx([10.0, 0.0]) and gain["mean"] == pytest.approx(5.0)
    assert table["rows"]["seg"]["delta_m"] is None
    base = table["baselines"]["semseg miou"]
    assert base["mean"] == pytest.approx(0.40) and base["task"] == "semseg"
    assert [(run["seed"], run["value"]) for run in base["runs"]] == [(0, 0.38), (1, 0.42)]
    assert base["runs"][1]["config"] == json.loads((study / "seg-s1" / "config.json").read_text())
    assert table["other_budgets"] == [] and table["runs"]["dep"] == [str(study / f"dep-s{i}") for i in (0, 1)]
    assert "trained alone: semseg 0.4 (seeds 0, 1)" in (study / "out" / "report.html").read_text()


def test_another_budget_is_said(study, capsys) -> None:
    make_run(study / "long-s0", {"semseg": 0.5, "depth": 0.8}, train__epochs=20)
    assert compare(study, "long") == 0
    sentence = "train.epochs is 20 and 8."
    table = json.loads((study / "out" / "table.json").read_text())
    assert len(table["other_budgets"]) == 4 and all(line.endswith(sentence) for line in table["other_budgets"])
    assert sentence in capsys.readouterr().out and sentence in (study / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"protocol": "original"}, "were scored otherwise: protocol is 'original' and 'network'"),
        ({"data__image_size": [480, 640]}, "were scored otherwise: data.image_size is [480, 640] and [240, 320]"),
        ({"data__max_val": 9}, "were scored otherwise: data.max_val is 9 and None"),
    ],
)
def test_runs_that_were_scored_otherwise_are_refused(study, capsys, changes, says) -> None:
    make_run(study / "other-s0", {"semseg": 0.5, "depth": 0.8}, **changes)
    assert compare(study, "other") == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (study / "out").exists()


def test_what_is_no_baseline_is_named(study, capsys) -> None:
    def fails(*args, **kwargs) -> str:
        capsys.readouterr()
        assert compare(study, *args, **kwargs) == 2
        return capsys.readouterr().err

    assert "no baseline for depth: a run that trained it alone is missing" in fails("both", baselines="seg")
    make_run(study / "two-s0", {"semseg": 0.4, "depth": 1.0})
    assert "two-s0 is no baseline: it trained 2 tasks (semseg, depth)" in fails("both", baselines="two dep")
    make_run(study / "again-s0", {"semseg": 0.4})
    assert "two baselines for semseg" in fails("both", baselines="seg again dep")
    assert "every run is one of --baselines" in fails("seg")
    (study / "dep-s1" / "result.json").unlink()
    assert "dep-s1 holds no finished run" in fails("both")


def test_a_baseline_of_zero_has_no_relative_gain(tmp_path) -> None:
    zero = read_baselines({"x": [make_run(tmp_path / "zero", {"semseg": 0.0})]})
    with pytest.raises(ValueError, match="the baseline of semseg is 0"):
        scores_of(zero, ["semseg miou"])
    assert scores_of({}, ["semseg miou"]) is None and check_baselines({}, [tmp_path / "zero"]) == []
