"""One task of a run as a run of its own."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from m3bsr.cli import evaluate, extract_task, predict, train
from m3bsr.cli.common import open_run
from m3bsr.config import Config, DataConfig, ModelConfig, MoEConfig, Plan, RunConfig, TrainConfig
from m3bsr.moe.stats import RoutingCounts


def fails(capsys, argv) -> str:
    capsys.readouterr()
    assert extract_task.main([str(a) for a in argv]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def run(data_root, tmp_path_factory):
    """A run of one step with windows, gates before attention, and two trained experts per block."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    config = Config(
        data=DataConfig(root=str(data_root), tasks=("semseg", "depth"), image_size=(32, 48), num_workers=0),
        model=ModelConfig(backbone="m3vit_tiny_patch16", head_dim=8),
        moe=MoEConfig(blocks=(9, 11), num_experts=6, top_k=2, mlp_ratio=0.5, experts_per_task=4, gate_input="before"),
        bsr=Plan(train_blocks=(9, 11), train_experts=((1, 3), (2, 5)), drop_blocks=(9,), keep_rate=0.5,
                 score_source="own"),
        train=TrainConfig(max_steps=1, batch_size=2, eval_batch_size=3),
        run=RunConfig(dir=str(run_dir), device="cpu"),
    )  # fmt: skip
    train.run(config, tensorboard=False, progress_bar=False)
    return run_dir


def predictions(run_dir, images):
    _, model, _ = open_run(run_dir)
    with torch.no_grad():
        return model.eval()(images, tasks=("depth",)).predictions["depth"]


def test_with_all_experts_predictions_are_the_same(run, tmp_path, capsys):
    out = tmp_path / "alone"
    assert extract_task.main([str(run), "--task", "depth", "--threshold", "0", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "block 9: 4 experts (2 3 4 5)" in printed and str(out) in printed
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(predictions(out, images), predictions(run, images))
    report = json.loads((out / "extract.json").read_text())
    before, after = report["before"], report["after"]
    assert after["metrics"] == pytest.approx(before["metrics"])
    assert after["num_params"] < before["num_params"] and after["bytes"] < before["bytes"]
    assert after["gmacs"] == pytest.approx(before["gmacs"], rel=1e-6) and after["gmacs"] < before["gmacs_all_tasks"]
    config, model, _ = open_run(out)
    assert config.data.tasks == model.tasks == ("depth",)
    assert config.moe.num_experts == (4, 4) and config.moe.blocks == (9, 11)
    assert config.bsr.train_experts == ((1,), (0, 3))  # of experts 1, 3 and 2, 5: the window starts at 2
    assert "is there already" in fails(capsys, [run, "--task", "depth", "--out", out])


def test_other_commands_open_the_folder_of_few_experts(run, tmp_path):
    assert extract_task.main([str(run), "--task", "depth", "--threshold", "1", "--max-val", "2"]) == 0
    out = run.with_name("run-depth")
    report = json.loads((out / "extract.json").read_text())
    assert [len(ids) for ids in report["experts"].values()] == [2, 2]  # top-k of them, whatever the threshold
    assert report["num_images"] == 2
    assert evaluate.main([str(out), "--max-val", "2"]) == 0
    again = json.loads((out / "metrics-last-network-first2.json").read_text())
    assert again["metrics"]["depth"] == pytest.approx(report["after"]["metrics"], rel=1e-5)
    Image.new("RGB", (60, 40), "grey").save(tmp_path / "photo.png")
    assert predict.main([str(out), str(tmp_path / "photo.png")]) == 0


def test_errors_come_before_the_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(RoutingCounts, "add", lambda *_: pytest.fail("measured"))
    assert "did you mean 'depth'" in fails(capsys, [run, "--task", "dept"])
    assert "threshold must be a share" in fails(
        capsys, [run, "--task", "depth", "--threshold", "2", "--out", tmp_path / "out"]
    )
    assert "no such run folder" in fails(capsys, [tmp_path / "none", "--task", "depth"])
    assert not (tmp_path / "out").exists()


def test_how_a_run_was_spread_over_processes_does_not_matter():
    """Three experts do not divide among the two processes that shared out eight."""
    config = Config(moe=MoEConfig(blocks=(9,), num_experts=8, top_k=2, expert_parallel=2), bsr=Plan(train_blocks=(9,)))
    alone = extract_task.config_of(config, "depth", {9: (1, 4, 5)})
    assert alone.moe.num_experts == (3,) and alone.moe.expert_parallel == 1
