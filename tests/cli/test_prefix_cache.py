"""Training with kept prefixes through the real command line: the same bits as without, and no prefix computed twice."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from m3bsr.cli import train as train_module
from m3bsr.cli.train import main as train
from m3bsr.engine.log import read_log
from m3bsr.models import MultiTaskModel

# Blocks 0 to 3 are the prefix; block 1 drops half of the tokens. Two views, flipped or not and zoomed, take turns.
DENSE = """
from m3bsr.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, Plan, RunConfig, TrainConfig

config = Config(
    data=DataConfig(name="nyud", root={root!r}, tasks=("semseg", "depth"), image_size=(32, 48), num_workers=0,
                    num_views=2),
    model=ModelConfig(backbone="test_vit", head_dim=8),
    moe=MoEConfig(blocks=(5,), num_experts=4, top_k=2, mlp_ratio=0.5),
    bsr=Plan(train_blocks=(4, 5), drop_blocks=(1,), keep_rate=0.5),
    train=TrainConfig(epochs=3, batch_size=2, eval_every=0, eval_batch_size=3, log_every=1),
    optim=OptimConfig(lr=1e-3),
    run=RunConfig(dir={run!r}, device="cpu"),
)
"""
CLASSES = """
from m3bsr.config import Config, DataConfig, ModelConfig, Plan, RunConfig, TrainConfig

config = Config(
    data=DataConfig(name="image_folder", root={root!r}, tasks=("classification",), image_size=(48, 48), num_workers=1,
                    augment="crop"),
    model=ModelConfig(backbone="test_vit"),
    bsr=Plan(train_blocks=(3, 5), drop_blocks=(3, 4), keep_rate=0.5),
    train=TrainConfig(epochs=3, batch_size=2, eval_every=0, log_every=1),
    run=RunConfig(dir={run!r}, device="cpu"),
)
"""
CACHE = "--bsr.cache-prefix"


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(train_module, "finish_run", lambda *args: None)


@pytest.fixture
def dense(tmp_path, data_root):
    path = tmp_path / "job.py"
    path.write_text(DENSE.format(root=str(data_root), run=str(tmp_path / "run")))
    return SimpleNamespace(config=str(path), runs=tmp_path)


@pytest.fixture
def classes(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "job.py"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    path.write_text(CLASSES.format(root=str(tmp_path / "data"), run=str(tmp_path / "run")))
    return SimpleNamespace(config=str(path), runs=tmp_path)


@pytest.fixture
def prefixes(monkeypatch):
    """Number of images in each computation of a prefix, the one of the estimate left out."""
    computed, real = [], MultiTaskModel.forward_prefix

    def counted(self, images, num_blocks):
        if images.any():
            computed.append(len(images))
        return real(self, images, num_blocks)

    monkeypatch.setattr(MultiTaskModel, "forward_prefix", counted)
    return computed


def go(job, run, *more):
    return train([job.config, "--run.dir", str(job.runs / run), *more])


def bits(job, run):
    return load_file(job.runs / run / "checkpoints" / "last" / "model.safetensors")


def assert_same(job, *runs):
    a, b = (bits(job, run) for run in runs)
    assert a.keys() == b.keys() and [k for k in a if not np.array_equal(a[k].numpy(), b[k].numpy())] == []


def losses(job, run):
    return [r["losses"] for r in read_log(job.runs / run / "log.jsonl") if r["kind"] == "train"]


def test_dense_training_is_bit_equal_and_skips_the_prefix(dense, prefixes, capsys):
    assert go(dense, "plain") == 0 and prefixes == []
    assert go(dense, "kept", CACHE) == 0
    assert "blocks 0 to 3 (block 4 trains)" in capsys.readouterr().err
    assert prefixes == [2] * 4  # two epochs of two steps: every view once
    assert_same(dense, "plain", "kept")
    assert losses(dense, "plain") == losses(dense, "kept") and len(losses(dense, "kept")) == 6
    kept = dense.runs / "kept" / "prefix_cache"
    assert len(list(kept.rglob("*.safetensors"))) == 8 and len(list(kept.rglob("*"))) == 9


def test_full_fine_tuning_has_no_prefix(dense, capsys):
    assert go(dense, "full", CACHE, "--bsr.train-blocks", "all", "--bsr.drop-blocks") == 2
    assert "nothing to keep: the patch embedding trains" in capsys.readouterr().err


def test_mixed_pictures_have_none_either(classes, capsys):
    assert go(classes, "mixed", CACHE, "--data.mixup", "0.2") == 2
    assert "bsr.cache_prefix keeps fixed views" in capsys.readouterr().err


@pytest.mark.slow
def test_classification_with_a_worker_and_one_view_by_default(classes, prefixes, capsys):
    assert go(classes, "kept", CACHE) == 0
    assert "blocks 0 to 2 (block 3 trains)" in capsys.readouterr().err
    assert 2 <= len(prefixes) <= 4  # of 6 steps; the worker may have looked for two batches before they were written
    assert json.loads((classes.runs / "kept" / "config.json").read_text())["data"]["num_views"] == 1
    assert go(classes, "plain", "--data.num-views", "1") == 0
    assert_same(classes, "kept", "plain")


@pytest.mark.slow
def test_runs_share_a_folder(dense, prefixes, capsys):
    folder = ["--run.cache-dir", str(dense.runs / "shared")]
    assert go(dense, "one", CACHE, *folder, "--train.epochs", "2") == 0
    assert go(dense, "two", CACHE, *folder, "--train.epochs", "2", "--optim.lr", "1e-4") == 0
    assert prefixes == [2] * 4 and "8 of 8 views" in capsys.readouterr().err


@pytest.mark.slow
def test_a_linear_probe_is_all_prefix(classes, capsys):
    assert go(classes, "kept", CACHE, "--model.method", "head") == 0
    assert "blocks 0 to 5 (no block trains)" in capsys.readouterr().err
    assert go(classes, "plain", "--model.method", "head", "--data.num-views", "1") == 0
    assert_same(classes, "kept", "plain")


@pytest.mark.slow
def test_stopped_and_resumed_with_or_without_the_cache(dense, monkeypatch):
    assert go(dense, "whole", CACHE) == 0
    real = MultiTaskModel.set_step

    def stop_in_step_4(self, step):
        real(self, step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    for name, then in (("kept", [CACHE]), ("left", [])):
        with monkeypatch.context() as patch:
            patch.setattr(MultiTaskModel, "set_step", stop_in_step_4)
            assert go(dense, name, CACHE) == 128 + signal.SIGTERM
        assert go(dense, name, *then, "--run.resume") == 0
        assert_same(dense, "whole", name)


@pytest.mark.slow
def test_other_views_need_another_run(classes, capsys):
    assert go(classes, "run", "--train.epochs", "1") == 0
    assert go(classes, "run", CACHE, "--run.resume") == 2
    assert "data.num_views = None, now it is 1" in capsys.readouterr().err


def test_of_two_processes_one_says_that_there_is_nothing_to_keep(dense, many, tmp_path):
    argv = ["--train.batch-size", "1", "--bsr.train-blocks", "all", "--bsr.drop-blocks"]
    pids = many.start(2, lambda rank: go(dense, "full", CACHE, *argv), tmp_path)
    assert many.wait(pids) == [2, 2]
    said = "".join((tmp_path / f"output-{rank}.txt").read_text() for rank in range(2))
    assert said.count("error: ") == 1 and "nothing to keep: the patch embedding trains" in said


@pytest.mark.slow
def test_two_processes_share_a_cache_and_train_to_the_same_bits(dense, prefixes, many, tmp_path):
    """Every view is computed once by the process that meets it first; in the third epoch both read."""

    def one(run, *more):
        return lambda rank: (go(dense, run, "--train.batch-size", "1", *more), list(prefixes))

    assert many.run(2, one("plain"), tmp_path / "a", timeout_s=400) == [(0, []), (0, [])]
    assert many.run(2, one("kept", CACHE), tmp_path / "b", timeout_s=400) == [(0, [1] * 4), (0, [1] * 4)]
    assert "8 of 8 views" not in (tmp_path / "b/output-0.txt").read_text()
    assert_same(dense, "plain", "kept")
    assert losses(dense, "plain") == losses(dense, "kept") and len(losses(dense, "kept")) == 6
    files = list((dense.runs / "kept" / "prefix_cache").rglob("*"))
    assert len([path for path in files if path.suffix == ".safetensors"]) == 8 and len(files) == 9
