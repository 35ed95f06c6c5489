"""How a rendered scene is written to disk: one function and one entry in LAYOUTS for each layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scene_rooms import render_scene

# The 40 classes in the order of the raw labels 1 to 40, spelled as in NYUD_MT.
NYUD_NAMES = [
    "wall",
    "floor",
    "cabinet",
    "bed",
    "chair",
    "sofa",
    "table",
    "door",
    "window",
    "bookshelf",
    "picture",
    "counter",
    "blinds",
    "desk",
    "shelves",
    "curtain",
    "dresser",
    "pillow",
    "mirror",
    "floor mat",
    "clothes",
    "ceiling",
    "books",
    "refridgerator",
    "television",
    "paper",
    "towel",
    "shower curtain",
    "box",
    "whiteboard",
    "person",
    "night stand",
    "toilet",
    "sink",
    "lamp",
    "bathtub",
    "bag",
    "otherstructure",
    "otherfurniture",
    "otherprop",
]


def _write_nyud(root: Path, name: str, sample: dict[str, np.ndarray]) -> None:
    Image.fromarray(sample["image"]).save(root / "images" / f"{name}.jpg", quality=92)
    Image.fromarray(sample["segmentation"]).save(root / "segmentation" / f"{name}.png")
    for task in ("depth", "normals", "edge"):
        np.save(root / task / f"{name}.npy", sample[task])


def _finish_nyud(root: Path, splits: dict[str, list[str]], samples: dict[str, dict]) -> None:
    for split, names in splits.items():
        (root / "gt_sets" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "class_names.txt").write_text("".join(f"{name}\n" for name in NYUD_NAMES))


@dataclass(frozen=True)
class Layout:
    """`write` stores one sample and may return facts about it, which `finish` gets for all samples by name."""

    folders: tuple[str, ...]
    render: Callable[..., dict[str, np.ndarray]]
    write: Callable[[Path, str, dict[str, np.ndarray]], dict | None]
    finish: Callable[[Path, dict[str, list[str]], dict[str, dict]], None]


LAYOUTS: dict[str, Layout] = {
    "NYUD_MT": Layout(
        ("images", "segmentation", "depth", "normals", "edge", "gt_sets"), render_scene, _write_nyud, _finish_nyud
    ),
}
