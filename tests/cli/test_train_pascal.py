"""A training on drawn figures in PASCAL_MT layout, five tasks, some pictures without people."""

from __future__ import annotations

import json
from pathlib import Path

from m3bsr.cli import train

ROOT = Path(__file__).resolve().parents[2]


def test_all_tasks_of_pascal_train_and_are_scored(load, tmp_path):
    scenes = load("datasets/scenes/make_scenes.py")
    scenes.make_scenes(tmp_path / "PASCAL_MT", 4, 3, "target", (48, 64), 1, "PASCAL_MT", quiet=True)
    arguments = (
        f"--data.root {tmp_path / 'PASCAL_MT'} --run.dir {tmp_path / 'run'} --data.image-size 32 48 "
        "--data.num-workers 0 --train.batch-size 2 --train.max-steps 1 --optim.warmup-steps 0 --model.head-dim 8 "
        "--moe.num-experts 4 --moe.mlp-ratio 0.5"
    )
    assert train.main([str(ROOT / "configs" / "scenes_pascal.py"), *arguments.split()]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(result["metrics"]) == ["semseg", "human_parts", "saliency", "normals", "edge"]
    assert all(0 <= result["metrics"][task]["miou"] <= 1 for task in ("semseg", "human_parts", "saliency"))
    assert 0 <= result["metrics"]["edge"]["ods_f"] <= 1 and 0 <= result["metrics"]["normals"]["mean"] <= 180
