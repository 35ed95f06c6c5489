"""Several tasks together and each alone under one budget: delta_m against runs of the same command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m3bsr.cli import compare

CONFIG = """
from m3bsr.config import Config, DataConfig, ModelConfig, OptimConfig, Plan, TrainConfig

config = Config(
    data=DataConfig(name="nyud", root={root!r}, tasks=("semseg", "depth"), image_size=(32, 48), num_workers=0),
    model=ModelConfig(backbone="test_vit", head_dim=8),
    bsr=Plan(train_blocks=(3, 5), drop_blocks=(2,), keep_rate=0.5),
    train=TrainConfig(epochs=1, batch_size=2, eval_batch_size=3, eval_every=0),
    optim=OptimConfig(lr=1e-3),
)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory, data_root) -> str:
    path = tmp_path_factory.mktemp("job") / "two.py"
    path.write_text(CONFIG.format(root=str(data_root)))
    return str(path)


def test_each_task_alone_is_the_baseline(config, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    argv = [config, "--single-task", "--single-task-options=--model.method full", "--seeds", "2"]
    argv += ["--out", str(out), "--rounds", "0", "--pictures", "0"]
    assert compare.main(argv) == 0
    assert "delta_m is against the same tasks trained alone: semseg" in capsys.readouterr().out
    table = json.loads((out / "table.json").read_text())
    assert list(table["rows"]) == ["single_semseg", "single_depth", "bsr"]

    def scores(name: str, task: str, metric: str) -> list[float]:
        files = [out / f"{name}-s{seed}" / "result.json" for seed in range(2)]
        return [json.loads(file.read_text())["metrics"][task][metric] for file in files]

    alone = {"semseg": scores("single_semseg", "semseg", "miou"), "depth": scores("single_depth", "depth", "rmse")}
    base = {task: sum(values) / 2 for task, values in alone.items()}
    gains = [
        50 * ((miou - base["semseg"]) / base["semseg"] - (rmse - base["depth"]) / base["depth"])
        for miou, rmse in zip(scores("bsr", "semseg", "miou"), scores("bsr", "depth", "rmse"), strict=True)
    ]
    assert table["rows"]["bsr"]["delta_m"]["values"] == pytest.approx(gains)
    for column, task in (("semseg miou", "semseg"), ("depth rmse", "depth")):
        runs = table["baselines"][column]["runs"]
        assert [run["value"] for run in runs] == alone[task] and [run["seed"] for run in runs] == [0, 1]
        for run in runs:
            assert run["config"] == json.loads((Path(run["folder"]) / "config.json").read_text())
            assert run["config"]["data"]["tasks"] == [task] and run["config"]["model"]["method"] == "full"
    assert table["other_budgets"] == []
    assert json.loads((out / "bsr-s0" / "config.json").read_text())["data"]["tasks"] == ["semseg", "depth"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--single-task", "--data.tasks", "depth"], "has one task already (depth)"),
        (["--methods", "full", "--single-task-options=--optim.lr 1"], "--single-task-options are for the runs of"),
        (["--single-task", "--variant", "single_depth=--optim.lr 1"], "--single-task names its runs single_depth"),
        (["--single-task", "--single-task-options=--optim.lrr 1"], "--optim.lr"),
    ],
)
def test_errors_come_before_any_training(config, tmp_path, capsys, options, message) -> None:
    assert compare.main([config, "--out", str(tmp_path / "out"), *options]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and err.count("\n") == 0 and not (tmp_path / "out").exists()
