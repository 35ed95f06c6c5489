"""An image folder through the real command lines: train, resume, evaluate, predict, cost, report."""

from __future__ import annotations

import json
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from m3bsr.build import build_model, build_tasks
from m3bsr.cli import train as train_module
from m3bsr.cli.common import open_run
from m3bsr.cli.evaluate import main as evaluate
from m3bsr.cli.measure_cost import main as measure_cost
from m3bsr.cli.predict import main as predict
from m3bsr.cli.predict import predict as predict_photo
from m3bsr.cli.train import main as train
from m3bsr.config import load_config, replace
from m3bsr.delta import read_delta

CONFIG = """
from m3bsr.config import Config, DataConfig, ModelConfig, OptimConfig, Plan, RunConfig, TrainConfig

config = Config(
    data=DataConfig(name="image_folder", root={root!r}, tasks=("classification",), image_size=(32, 32),
                    augment="flip", num_workers=0),
    model=ModelConfig(backbone="deit_tiny_patch16_224", weights={weights!r}),
    bsr=Plan(train_blocks=(3, 11), drop_blocks=(3, 6), keep_rate=0.5, score_source="own"),
    train=TrainConfig(epochs=3, batch_size=4, eval_batch_size=5, log_every=1),
    optim=OptimConfig(lr=2e-3),
    run=RunConfig(dir={run!r}, device="cpu"),
)
"""


@pytest.fixture(scope="module")
def folder(draw_colours, tmp_path_factory):
    """Red and green pictures in two classes, and weights with a known final norm."""
    root = draw_colours(tmp_path_factory.mktemp("colours"), train=8, val=3)
    torch.manual_seed(0)
    state = timm.create_model("deit_tiny_patch16_224", num_classes=5).state_dict()
    state["norm.bias"] += 0.25
    save_file(state, root / "weights.safetensors")
    return root


@pytest.fixture
def job(tmp_path, folder):
    path, run = tmp_path / "job.py", tmp_path / "run"
    path.write_text(CONFIG.format(root=str(folder), weights=str(folder / "weights.safetensors"), run=str(run)))
    return SimpleNamespace(config=str(path), run=run, folder=folder)


def test_train_evaluate_predict_report(job, capsys, tmp_path):
    assert train([job.config]) == 0
    result = json.loads((job.run / "result.json").read_text())
    assert result["metrics"]["classification"]["top1"] == 1.0  # two colours are soon told apart
    config = json.loads((job.run / "config.json").read_text())
    assert config["data"]["num_classes"] == {"classification": 2}
    assert "classification: teal" in (job.run / "report.html").read_text()
    capsys.readouterr()
    assert evaluate([str(job.run)]) == 0
    assert "top1 1" in capsys.readouterr().out
    assert evaluate([str(job.run), "--keep-rate", "1", "--split", "train"]) == 0
    assert "16 images" in capsys.readouterr().out and (job.run / "metrics-last-network-train-keep1.json").is_file()
    assert read_delta(job.run / "delta.safetensors").plan.train_blocks == (3, 11)
    photo = next((job.folder / "val" / "red").iterdir())
    assert predict([str(job.run), str(photo), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / photo.name).stat().st_size > 1000
    assert measure_cost([job.config, "--json", "--data.num-classes", "classification", "10"]) == 0
    out = capsys.readouterr().out
    cost = json.loads(out[out.index("{") :])
    assert 0 < cost["train_step_gmacs"] < 3 * cost["forward_gmacs"]


def test_the_test_split_is_scored_once_with_the_checkpoint_that_val_chose(job, capsys, tmp_path):
    """``train`` as test split: what is scored there is not what chose the checkpoint."""
    options = ["--data.test-split", "train", "--train.epochs", "2", "--train.batch-size", "8"]
    options += ["--model.backbone", "test_vit", "--model.weights", "", "--bsr.train-blocks", "3", "5"]
    options += ["--bsr.drop-blocks", "2"]
    assert train([job.config, *options]) == 0
    assert "train split, 16 images, best checkpoint:" in capsys.readouterr().out
    result = json.loads((job.run / "result.json").read_text())
    assert result["test"]["split"] == "train" and result["test"]["num_images"] == 16
    assert evaluate([str(job.run), "--checkpoint", "best", "--split", "train"]) == 0
    again = json.loads((job.run / "metrics-best-network-train.json").read_text())
    assert again["metrics"] == result["test"]["metrics"]
    assert train([job.config, "--data.test-split", "test", "--run.dir", str(tmp_path / "none")]) == 2
    assert "has no folder test" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_stopped_run_resumes_to_the_same_bits(job, tmp_path, monkeypatch):
    assert train([job.config]) == 0
    other = tmp_path / "other"
    build_model = train_module.build_model

    def stopping(config):
        model = build_model(config)
        model.set_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 4 else None
        return model

    monkeypatch.setattr(train_module, "build_model", stopping)
    assert train([job.config, "--run.dir", str(other)]) == 143
    monkeypatch.undo()
    assert train([job.config, "--run.dir", str(other), "--run.resume"]) == 0
    one, two = ((run / "checkpoints" / "last" / "model.safetensors").read_bytes() for run in (job.run, other))
    assert one == two


def test_final_norm_comes_with_the_weights(job):
    assert train([job.config, "--train.max-steps", "1", "--bsr.train-blocks", "--optim.lr", "1e-12"]) == 0
    _, model, _ = open_run(job.run)
    assert torch.allclose(model.heads["classification"].norm.bias, torch.tensor(0.25), atol=1e-6)


def test_picture_of_a_prediction_shows_what_the_network_saw(job, tmp_path):
    """Else the dropped patches would be drawn in the wrong places."""
    config = replace(load_config(job.config), {"model.weights": "", "data.num_classes": {"classification": 2}})
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    sample = predict_photo(build_model(config), build_tasks(config), config, tmp_path / "wide.png")
    assert sample.photo.shape == (40, 40, 3) and sample.photo.min() == 255


def test_overwriting_leaves_nothing_of_the_old_run(job):
    old = [job.run / name for name in ("result.json", "cost.json", "delta.safetensors", "log.jsonl")]
    job.run.mkdir()
    for path in old:
        path.write_text("{}")
    config = replace(load_config(job.config), {"run.overwrite": True})
    assert not train_module.prepare_run_dir(job.run, config)
    assert not any(path.exists() for path in old)


def test_experts_are_counted_on_images_of_all_classes(job, monkeypatch):
    """The first images of a folder are all of its first class."""
    seen = []
    monkeypatch.setattr(
        train_module,
        "build_model",
        lambda config: SimpleNamespace(to=lambda device: SimpleNamespace(backbone=SimpleNamespace(blocks=range(12)))),
    )
    monkeypatch.setattr(train_module, "choose_experts", lambda *args: ((0,),))
    config = replace(load_config(job.config), {"bsr.train_experts": "top:1", "train.batch_size": 1})

    class Pictures(list):
        def __getitem__(self, index):
            seen.append(index)
            return {"image": torch.zeros(3, 8, 8)}

    train_module.with_chosen_experts(config, Pictures(range(16)), torch.device("cpu"), False)
    assert seen == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.root", "nowhere"], "no such folder: nowhere"),
        (["--data.tasks", "semseg"], "data.tasks of image_folder"),
        (["--data.augment", "astmt"], "data.augment"),
        (["--data.num-classes", "classification", "1"], "data.num_classes of classification is 1, but"),
        (["--data.num-classes", "depth", "1"], "data.num_classes: task"),
        (
            ["--model.backbone", "vit_tiny_patch16_224.nonsense"],
            "unknown weights vit_tiny_patch16_224.nonsense; .*augreg",
        ),
        (["--loss.label-smoothing", "1"], "loss.label_smoothing must lie in"),
    ],
)
def test_user_errors_are_one_line(job, capsys, options, expected):
    assert train([job.config, *options]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert re.search(expected, err[-1]) and err[-1].startswith("error: ")
