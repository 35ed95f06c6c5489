"""Every config of NYUD and PASCAL-Context from command line to metrics, on drawn data in its layout, at tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3bsr.cli import train
from m3bsr.config import load_config

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {"nyud": "NYUD_MT", "pascal": "PASCAL_MT"}
CONFIGS = {path.stem: load_config(path) for path in sorted((ROOT / "configs").glob("*.py"))}
RUN = [name for name, config in CONFIGS.items() if config.data.name in LAYOUTS and not config.data.sets]
# Between them: both layouts, experts and none, BSR and all trained, both recipes; the others are slow tests.
QUICK = ("moe_nyud_2task", "vit_pascal_m3vit")
BACKBONES = {"m3vit_small_patch16": "m3vit_tiny_patch16", "deit_small_patch16_224": "deit_tiny_patch16_224"}


@pytest.fixture(scope="module")
def roots(load, tmp_path_factory) -> dict[str, Path]:
    """The same rooms with figures in both layouts."""
    scenes = load("datasets/scenes/make_scenes.py")
    found = {}
    for name, layout in LAYOUTS.items():
        found[name] = tmp_path_factory.mktemp("data") / layout
        scenes.make_scenes(found[name], 4, 2, "target", (48, 64), 1, layout, quiet=True)
    return found


def test_there_is_a_config_of_each_kind() -> None:
    kinds = ("", "_full", "_m3vit")
    bases = ("moe_nyud", "moe_nyud_2task", "moe_pascal", "vit_nyud", "vit_pascal")
    assert {base + kind for base in bases for kind in kinds} <= set(RUN) and set(QUICK) <= set(RUN)
    for base in bases:
        bsr, full, published = (CONFIGS[base + kind] for kind in kinds)
        assert bsr.bsr.train_blocks != "all" and full.bsr.train_blocks == published.bsr.train_blocks == "all"
        assert full.data == bsr.data == published.data and full.optim == bsr.optim
        optim, steps = published.optim, published.train
        assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 2e-3, 0.9, 1e-4)
        assert (optim.schedule, optim.poly_power) == ("poly", 0.9)
        assert (steps.epochs, steps.batch_size * steps.accumulate, published.loss.stride) == (100, 16, 1)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUN])
def test_config_trains_and_is_scored(name: str, roots: dict[str, Path], tmp_path: Path) -> None:
    config = CONFIGS[name]
    arguments = (
        f"--data.root {roots[config.data.name]} --run.dir {tmp_path / 'run'} --run.device cpu --data.image-size 32 48 "
        f"--model.backbone {BACKBONES.get(config.model.backbone, config.model.backbone)} --model.weights= "
        "--data.num-workers 0 --train.batch-size 2 --train.max-steps 1 --optim.warmup-steps 0 --model.head-dim 8 "
        "--moe.num-experts 4 --moe.mlp-ratio 0.25"
    )
    assert train.main([str(ROOT / "configs" / f"{name}.py"), *arguments.split()]) == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert list(metrics) == list(config.data.tasks)
    for task, values in metrics.items():
        if "miou" in values:
            assert 0 <= values["miou"] <= 1, task
    assert 0 < metrics["depth"]["rmse"] < 100 if "depth" in metrics else 0 <= metrics["normals"]["mean"] <= 180


@pytest.mark.slow
def test_config_of_several_sets_trains_and_is_scored(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for split in ("train", "val"):
        for value, name in enumerate(("dark", "light")):
            (pictures / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = np.full((32, 32, 3), 250 * value + i, np.uint8)
                Image.fromarray(pixels).save(pictures / split / name / f"{i}.png")
    arguments = (
        f"--data.sets.objects image_folder:{pictures} --run.dir {tmp_path / 'run'} --run.device cpu "
        "--data.image-size 32 32 --data.max-val 4 --data.num-workers 0 --model.weights= --train.batch-size 2 "
        "--train.max-steps 2 --optim.warmup-steps 0"
    )
    assert train.main([str(ROOT / "configs" / "moe_classification.py"), *arguments.split()]) == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert set(metrics) == {"objects", "digits"} and all(0 <= values["top1"] <= 1 for values in metrics.values())
