"""Two classification data sets, one MoE backbone, through the real command lines."""

from __future__ import annotations

import json
import signal

import pytest

from m3bsr.cli import train as train_module
from m3bsr.cli.evaluate import main as evaluate
from m3bsr.cli.measure_cost import main as measure_cost
from m3bsr.cli.measure_cost import step_job
from m3bsr.cli.plan import empty_job
from m3bsr.cli.train import main as train
from m3bsr.config import load_config
from m3bsr.engine.predict_cost import predict

CONFIG = """
from m3bsr.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, Plan, RunConfig, TrainConfig

config = Config(
    data=DataConfig(sets={{"colours": "image_folder:{root}", "more": "image_folder:{root}"}},
                    tasks=("colours", "more"), image_size=(32, 32), augment="none", num_workers=0),
    model=ModelConfig(backbone="m3vit_tiny_patch16"),
    moe=MoEConfig(blocks=(9, 11), num_experts=4, top_k=2, mlp_ratio=0.5),
    bsr=Plan(train_blocks=(9, 11), drop_blocks=(3,), keep_rate=0.5),
    train=TrainConfig(epochs=2, batch_size=4, eval_batch_size=5, log_every=1),
    optim=OptimConfig(lr=1e-3),
    run=RunConfig(dir={run!r}, device="cpu"),
)
"""


@pytest.fixture
def job(draw_colours, tmp_path):
    root = draw_colours(tmp_path / "colours_in_folders", train=4, val=2)
    path = tmp_path / "job.py"
    path.write_text(CONFIG.format(root=root, run=str(tmp_path / "run")))
    return str(path), tmp_path / "run"


def weights(run):
    return (run / "checkpoints" / "last" / "model.safetensors").read_bytes()


def test_train_resume_evaluate_one_task(job, capsys, monkeypatch, tmp_path):
    config, run = job
    assert train([config, "--data.interleave", "round_robin", "--train.accumulate", "2"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert set(result["metrics"]) == {"colours", "more"} and result["total_steps"] == 4
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert set(records[0]["losses"]) == {"colours", "more"}  # a step of both sets
    saved = json.loads((run / "config.json").read_text())
    assert saved["data"]["num_classes"] == {"colours": 2, "more": 2}

    build_model = train_module.build_model

    def stopping(config):
        model = build_model(config)
        model.set_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 1 else None
        return model

    again = ["--run.dir", str(tmp_path / "again"), "--data.interleave", "round_robin", "--train.accumulate", "2"]
    monkeypatch.setattr(train_module, "build_model", stopping)
    assert train([config, *again]) == 143
    monkeypatch.undo()
    assert train([config, *again, "--run.resume"]) == 0
    assert weights(run) == weights(tmp_path / "again")

    capsys.readouterr()
    assert evaluate([str(run), "--tasks", "more"]) == 0
    out = capsys.readouterr().out
    assert "more" in out and "colours" not in out.splitlines()[1]
    assert measure_cost([config]) == 0


def test_plans_are_predicted_for_a_step_of_one_set(job):
    config = load_config(job[0])
    assert predict(empty_job(config), config.bsr).peak_bytes == predict(step_job(config)).peak_bytes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.sets.more", "nyud:x"], "data.sets of more: nyud has no image classes"),
        (["--data.sets.more", "digit"], "did you mean 'digits'?"),
        (["--data.tasks", "colours", "less"], "must be names of data.sets (colours, more)"),
        (["--data.interleave", "robin"], "round_robin"),
        (["--data.temperature", "0"], "data.temperature must be"),
    ],
)
def test_user_errors_are_one_line(job, capsys, options, expected):
    assert train([job[0], *options]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert expected in err[-1] and err[-1].startswith("error: ")
