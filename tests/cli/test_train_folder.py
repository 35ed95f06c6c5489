"""Own data in a folder, from labels on disk to a scored model that needs the data no more."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from m3bsr.cli import train


def test_dense_tasks_and_a_class_per_image_train_together(job, tmp_path):
    root, rng = tmp_path / "own", np.random.default_rng(0)
    for folder in ("images", "semseg", "depth"):
        (root / folder).mkdir(parents=True)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 6, (40, 56), np.uint8)).save(root / "semseg" / f"{i}.png")
        if i % 3:
            np.save(root / "depth" / f"{i}.npy", rng.uniform(1, 3, (40, 56)))
    (root / "classification.csv").write_text("".join(f"{i}.png,{'abc'[i % 3]}\n" for i in range(10)))
    options = f"--data.name folder --data.root {root} --data.tasks semseg depth classification --train.max-steps 1"
    assert train.main([job.config, *options.split()]) == 0
    result = json.loads((job.run / "result.json").read_text())
    assert list(result["metrics"]) == ["semseg", "depth", "classification"]
    assert 0 <= result["metrics"]["semseg"]["miou"] <= 1 and 0 <= result["metrics"]["classification"]["top1"] <= 1
    saved = json.loads((job.run / "config.json").read_text())
    assert saved["data"]["num_classes"] == {"semseg": 6, "classification": 3}
