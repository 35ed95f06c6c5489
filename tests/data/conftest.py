from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

H, W = 24, 40


@pytest.fixture
def root(tmp_path):
    """Three training and one validation picture of 24x40 in NYUD_MT layout, labels with a known pattern."""
    root, rng = tmp_path / "NYUD_MT", np.random.default_rng(0)
    for folder in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (root / folder).mkdir(parents=True)
    for name in ("a", "b", "c", "d"):
        Image.fromarray(rng.integers(0, 256, (H, W, 3), dtype=np.uint8)).save(root / "images" / f"{name}.jpg")
        Image.fromarray(rng.integers(0, 41, (H, W), dtype=np.uint8)).save(root / "segmentation" / f"{name}.png")
        np.save(root / "depth" / f"{name}.npy", rng.uniform(0.5, 9, (H, W)).astype(np.float32))
        np.save(root / "normals" / f"{name}.npy", np.full((H, W, 3), (0.6, 0, -0.8), np.float32))
        np.save(root / "edge" / f"{name}.npy", rng.integers(0, 2, (H, W), dtype=np.uint8))
    (root / "gt_sets" / "train.txt").write_text("a\nb\nc\n")
    (root / "gt_sets" / "val.txt").write_text("d\n")
    return root
