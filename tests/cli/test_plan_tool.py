"""tools/plan.py: plans within a budget, as they are predicted and as they are measured."""

from __future__ import annotations

import json

import pytest

from m3bsr.cli.plan import PredictedCosts, empty_job, find_plans, main, parse_bytes
from m3bsr.config import Plan, load_config, replace
from m3bsr.engine.predict_cost import predict


def test_plans_fit_and_measure_as_predicted(job, capsys) -> None:
    budget = ["--memory", "40MB", "--step-ratio=0.55", "--num-blocks", "2", "--top", "1"]
    assert main([job.config, *budget, "--train.batch-size", "1", "--verify", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["batch_size"] for row in rows} <= {1, 2, 4}
    for row in rows:
        assert row["predicted_peak_bytes"] <= 40 * 2**20 and row["step_ratio"] <= 0.55
        assert row["measured_peak_bytes"] == pytest.approx(row["predicted_peak_bytes"], rel=0.05)
        assert row["measured_gmacs"] == pytest.approx(row["step_gmacs"], rel=0.02)
        assert len(row["plan"]["train_blocks"]) == 2


def test_table_and_command(job, capsys) -> None:
    assert main([job.config, "--step-ratio", "0.5", "--top", "2"]) == 0
    text = capsys.readouterr().out
    best = next(line for line in text.splitlines() if line.endswith("  best"))
    assert f"best: tools/train.py {job.config} --train.batch-size {best.split()[0]} --bsr.train-blocks" in text


def test_other_fields_of_the_plan_stay(job) -> None:
    config = replace(load_config(job.config), {"bsr.fuse": "mean", "bsr.restore": "bypass"})
    for row in find_plans(config, None, 0.5, top=1):
        assert (row["plan"].fuse, row["plan"].restore) == ("mean", "bypass")


def test_scaled_traces_equal_traced_ones(job) -> None:
    config = load_config(job.config)
    plan = Plan(train_blocks=(3, 9), drop_blocks=(5,), keep_rate=0.5, restore_before=9)
    large = replace(config, {"train.batch_size": 6})
    share, peak = PredictedCosts(empty_job(config)).at(6)(plan)
    predicted = predict(empty_job(large), plan)
    assert peak == pytest.approx(predicted.peak_bytes, rel=0.002)
    assert share * predict(empty_job(large), Plan()).train_step_macs == pytest.approx(predicted.train_step_macs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1MB"], "no plan fits: memory_bytes=1048576 is too little"),
        (["--step-ratio", "0.01"], "no plan fits: compute=0.01 is too little"),
        (["--memory", "much"], "--memory needs a size such as 1.5GB"),
        (["--step-ratio", "2"], "--step-ratio must lie in (0, 1]"),
        (["--num-blocks", "13"], "--num-blocks 13: the model has 12 blocks"),
        (["--memroy", "1GB"], "--memroy"),
    ],
)
def test_errors_are_one_line(job, capsys, arguments: list[str], message: str) -> None:
    assert main([job.config, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_sizes() -> None:
    assert parse_bytes("1.5GB") == 3 * 2**29
    assert parse_bytes(" 800 mb") == 800 * 2**20 == parse_bytes("800MiB")
    assert parse_bytes("123456") == 123456 == parse_bytes("123456B")
    for wrong in ("", "GB", "-1GB", "1.2.3GB", "0"):
        with pytest.raises(ValueError, match="--memory needs"):
            parse_bytes(wrong)
