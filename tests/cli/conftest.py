from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

CONFIG = """
from m3bsr.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, Plan, RunConfig, TrainConfig

config = Config(
    data=DataConfig(name="nyud", root={root!r}, tasks=("semseg", "depth"), image_size=(32, 48), num_workers=0),
    model=ModelConfig(backbone="m3vit_tiny_patch16", head_dim=8, drop_path=0.1),
    moe=MoEConfig(blocks=(9,), num_experts=4, top_k=2, mlp_ratio=0.5, noise_std=1.0),
    bsr=Plan(train_blocks=(9, 11), drop_blocks=(3,), keep_rate=0.5),
    train=TrainConfig(epochs=2, batch_size=2, eval_batch_size=3, log_every=1),
    optim=OptimConfig(lr=1e-3),
    run=RunConfig(dir={run!r}, device="cpu"),
)
"""


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """Four training and three validation pictures of 40x56 in NYUD_MT layout."""
    root, rng = tmp_path_factory.mktemp("NYUD_MT"), np.random.default_rng(0)
    for folder in ("images", "segmentation", "depth", "gt_sets"):
        (root / folder).mkdir()
    names = [f"{i:04d}" for i in range(7)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(root / "images" / f"{name}.jpg")
        Image.fromarray(rng.integers(0, 5, (40, 56), dtype=np.uint8)).save(root / "segmentation" / f"{name}.png")
        np.save(root / "depth" / f"{name}.npy", rng.uniform(1, 4, (40, 56)).astype(np.float32))
    (root / "gt_sets" / "train.txt").write_text("\n".join(names[:4]) + "\n")
    (root / "gt_sets" / "val.txt").write_text("\n".join(names[4:]) + "\n")
    return root


@pytest.fixture
def job(tmp_path, data_root):
    """A config file of a run of 4 steps, and where it will run."""
    run_dir = tmp_path / "run"
    path = tmp_path / "job.py"
    path.write_text(CONFIG.format(root=str(data_root), run=str(run_dir)))
    return SimpleNamespace(config=str(path), run=run_dir)


@pytest.fixture(scope="session")
def draw_colours():
    """``draw_colours(root, train=4, val=2)``: so many red and so many teal pictures of 24x24, a folder a class."""

    def draw(root: Path, **splits: int) -> Path:
        rng = np.random.default_rng(0)
        for split, num in splits.items():
            for channel, name in enumerate(("red", "teal")):
                (root / split / name).mkdir(parents=True)
                for i in range(num):
                    pixels = rng.integers(0, 60, (24, 24, 3), dtype=np.uint8)
                    pixels[..., channel] += 180
                    Image.fromarray(pixels).save(root / split / name / f"{i}.png")
        return root

    return draw
