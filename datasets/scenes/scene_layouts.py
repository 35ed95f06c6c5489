"""How a rendered scene is written to disk: one function and one entry in LAYOUTS for each layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scene_figures import PART_NAMES, render_figures
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


VOC_NAMES = "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person"
VOC_NAMES += " pottedplant sheep sofa train tvmonitor"
VOC_VOID = 255


def _struct(rows: list[dict]) -> np.ndarray:
    """A MATLAB struct array [1, n], as savemat wants it."""
    array = np.empty((1, len(rows)), dtype=[(key, object) for key in rows[0]])
    for i, row in enumerate(rows):
        for key, value in row.items():
            array[0, i][key] = value
    return array


def annotation(name: str, sample: dict[str, np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """The `anno` struct of PASCAL-Part for the VOC objects of a picture, and their classes.

    anno(1).imname, .objects(i).class, .class_ind, .mask, .parts(k).part_name, .mask; parts only for people.
    """
    objects = []
    for number in np.unique(sample["instance"][sample["semseg"] > 0]):
        mask = (sample["instance"] == number) & (sample["semseg"] > 0)
        kind = int(sample["semseg"][mask][0])
        parts: np.ndarray = np.empty((0, 0))
        if kind == 15:
            there = np.unique(sample["part"][mask])
            rows = [
                {"part_name": PART_NAMES[p], "mask": (mask & (sample["part"] == p)).astype(np.uint8)} for p in there
            ]
            parts = _struct(rows)
        fields = {"class": VOC_NAMES.split()[kind], "class_ind": kind, "mask": mask.astype(np.uint8), "parts": parts}
        objects.append(fields)
    nothing = np.empty((1, 0), dtype=[(key, object) for key in ("class", "class_ind", "mask", "parts")])
    anno = _struct([{"imname": name, "objects": _struct(objects) if objects else nothing}])
    return anno, [fields["class_ind"] for fields in objects]


def _write_pascal(root: Path, name: str, sample: dict[str, np.ndarray]) -> dict:
    from scipy.io import savemat

    Image.fromarray(sample["image"]).save(root / "JPEGImages" / f"{name}.jpg", quality=92)
    mat = root / "pascal-context" / "trainval" / f"{name}.mat"
    savemat(mat, {"LabelMap": sample["context"]}, do_compression=True)
    semseg = sample["semseg"].copy()
    folder = "pascal-context"
    if int(name[-5:]) % 2 == 0:  # as in the original, some pictures have VOC labels, with void round the objects
        folder = "VOC12"
        semseg[(sample["edge"] > 0) & (semseg > 0)] = VOC_VOID
    Image.fromarray(semseg).save(root / "semseg" / folder / f"{name}.png")
    anno, classes = annotation(name, sample)
    savemat(root / "human_parts" / f"{name}.mat", {"anno": anno}, do_compression=True)
    normals = np.rint((sample["normals"] + 1.0) * 127.5).astype(np.uint8)
    Image.fromarray(normals).save(root / "normals_distill" / f"{name}.png")
    Image.fromarray(sample["saliency"] * 255).save(root / "sal_distill" / f"{name}.png")
    return {"classes": classes}


def _finish_pascal(root: Path, splits: dict[str, list[str]], samples: dict[str, dict]) -> None:
    for split, names in splits.items():
        (root / "ImageSets" / "Context" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        classes = {name: samples[name]["classes"] for name in names}
        (root / "ImageSets" / "Parts" / f"{split}.txt").write_text(json.dumps(classes, indent=0) + "\n")


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
    "PASCAL_MT": Layout(
        (
            "JPEGImages",
            "pascal-context/trainval",
            "semseg/VOC12",
            "semseg/pascal-context",
            "human_parts",
            "normals_distill",
            "sal_distill",
            "ImageSets/Context",
            "ImageSets/Parts",
        ),
        render_figures,
        _write_pascal,
        _finish_pascal,
    ),
}
