"""PASCAL-Context for multi-task learning, in the PASCAL_MT layout of ASTMT (Maninis et al., CVPR 2019).

``JPEGImages pascal-context/trainval semseg/{VOC12,pascal-context} human_parts normals_distill sal_distill ImageSets``;
see ``datasets/pascal/README.md``. Edges and normals are made from the label maps of PASCAL-Context on the fly.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from m3bsr.data.dense import DenseImages
from m3bsr.data.files import check_files, read_names
from m3bsr.data.pascal_classes import NORMALS_CLASSES, NUM_CONTEXT, PART_CLASSES, PARTS, PERSON, VOC_CLASSES
from m3bsr.data.targets import class_table, read_classes, read_mask, read_matlab, read_normals_picture
from m3bsr.data.transforms import Edge, Labels, Normals
from m3bsr.metrics.thinning import thin_words
from m3bsr.utils.constants import IGNORE
from m3bsr.utils.foreign import read_json

CLASS_TABLE = class_table(len(VOC_CLASSES))
HAS_NORMALS = np.isin(np.arange(NUM_CONTEXT + 1), list(NORMALS_CLASSES))
CONTEXT = "pascal-context/trainval"
SEMSEG = ("semseg/VOC12", "semseg/pascal-context")


class PascalContext(DenseImages):
    """One split of a folder in PASCAL_MT layout; see :class:`m3bsr.data.dense.DenseImages` for arguments and samples.

    Pictures without (annotated) people have no human parts: ``IGNORE`` everywhere, as in ASTMT.
    """

    known_tasks: ClassVar[tuple[str, ...]] = ("semseg", "human_parts", "saliency", "normals", "edge")
    task_kwargs: ClassVar[dict[str, dict[str, Any]]] = {
        "semseg": {"num_classes": len(VOC_CLASSES)},
        "human_parts": {"num_classes": len(PART_CLASSES)},
        "edge": {"max_dist": 0.0075},
    }
    class_names: ClassVar[dict[str, tuple[str, ...]]] = {"semseg": VOC_CLASSES, "human_parts": PART_CLASSES}
    folders: ClassVar[dict[str, tuple[str, ...]]] = {
        "semseg": SEMSEG,
        "human_parts": ("human_parts",),
        "saliency": ("sal_distill",),
        "normals": ("normals_distill", CONTEXT),
        "edge": (CONTEXT,),
    }

    def open(self) -> list[str]:
        for folder in ("JPEGImages", "ImageSets/Context"):
            if not (self.root / folder).is_dir():
                raise FileNotFoundError(f"{self.root} has no folder {folder}: not in PASCAL_MT layout")
        has = self.tasks_in(self.root)
        for task in self.tasks:
            if task not in has:
                raise FileNotFoundError(
                    f"{self.root} lacks {' and '.join(self.folders[task])}, needed for task {task}; "
                    f"tasks with labels there: {', '.join(has) or 'none'}"
                )
        return read_names(self.split_file)

    @classmethod
    def tasks_in(cls, root: Path) -> tuple[str, ...]:
        there = {task: [(root / folder).is_dir() for folder in folders] for task, folders in cls.folders.items()}
        return tuple(task for task, found in there.items() if (any(found) if task == "semseg" else all(found)))

    @property
    def split_file(self) -> Path:
        return self.root / "ImageSets" / "Context" / f"{self.split}.txt"

    def check(self) -> None:
        def there(names: list[str], folder: str, suffix: str) -> None:
            check_files(names, self.root / folder, suffix, self.split_file)

        there(self.names, "JPEGImages", ".jpg")
        if "semseg" in self.tasks:
            in_voc = set(os.listdir(self.root / SEMSEG[0])) if (self.root / SEMSEG[0]).is_dir() else set()
            rest = [name for name in self.names if f"{name}.png" not in in_voc]
            if rest:
                there(rest, SEMSEG[1] if (self.root / SEMSEG[1]).is_dir() else SEMSEG[0], ".png")
        if "human_parts" in self.tasks:
            there([name for name in self.names if self.label_file("human_parts", name)], "human_parts", ".mat")
        if "saliency" in self.tasks:
            there(self.names, "sal_distill", ".png")
        if "normals" in self.tasks:
            there(self.names, "normals_distill", ".png")
        if {"normals", "edge"} & set(self.tasks):
            there(self.names, CONTEXT, ".mat")

    def image_file(self, name: str) -> Path:
        return self.root / "JPEGImages" / f"{name}.jpg"

    def label_file(self, task: str, name: str) -> Path | None:
        if task == "semseg":
            voc = self.root / SEMSEG[0] / f"{name}.png"
            return voc if voc.is_file() else self.root / SEMSEG[1] / f"{name}.png"
        if task == "human_parts":
            nobody = PERSON not in self._objects.get(name, [PERSON])
            return None if nobody else self.root / "human_parts" / f"{name}.mat"
        folder, suffix = {
            "saliency": ("sal_distill", "png"),
            "normals": ("normals_distill", "png"),
            "edge": (CONTEXT, "mat"),
        }[task]
        return self.root / folder / f"{name}.{suffix}"

    def read_target(self, task: str, path: Path, name: str) -> Tensor | None:
        if task == "semseg":
            return read_classes(path, CLASS_TABLE)
        if task == "human_parts":
            return read_parts(path)
        if task == "saliency":
            return read_mask(path)
        label_map = read_label_map(self.root / CONTEXT / f"{name}.mat")
        if task == "edge":
            return Edge(torch.from_numpy(label_edges(label_map)).float()[None])
        normals = read_normals_picture(path)
        if normals.shape[1:] != label_map.shape:
            size = "{}x{}".format(*label_map.shape)
            raise ValueError(f"{path} is {normals.shape[1]}x{normals.shape[2]} pixels, its LabelMap {size}")
        return Normals(torch.where(torch.from_numpy(HAS_NORMALS[label_map])[None], normals, float(IGNORE)))

    @cached_property
    def _objects(self) -> dict[str, list[int]]:
        """VOC classes of the objects of each picture, where ``ImageSets/Parts`` lists them: saves opening files."""
        path = self.root / "ImageSets" / "Parts" / f"{self.split}.txt"
        if not path.is_file():
            return {}
        objects = read_json(path)
        if not isinstance(objects, dict) or not all(isinstance(classes, list) for classes in objects.values()):
            raise ValueError(f"{path}: expected a list of object classes for each picture")
        return objects


def read_label_map(path: Path) -> np.ndarray:
    """``LabelMap`` of PASCAL-Context, ``[H, W]``, classes 1 to 459 (0: none).

    Raises:
        FileNotFoundError, ValueError: missing, damaged, or no such map.
    """
    label_map = read_matlab(path, "LabelMap")
    if label_map.ndim != 2 or label_map.dtype.kind not in "iuf" or not label_map.size:
        raise ValueError(f"{path}: LabelMap must hold numbers [H, W], found {label_map.dtype} {label_map.shape}")
    if not (label_map >= 0).all() or label_map.max() > NUM_CONTEXT:
        wrong = label_map[~((label_map >= 0) & (label_map <= NUM_CONTEXT))][0]
        raise ValueError(f"{path}: label {wrong:g} is out of range; known: 0-{NUM_CONTEXT}")
    return label_map.astype(np.int64)


def label_edges(label_map_HW: np.ndarray) -> np.ndarray:
    """Where the label of a neighbour (left, right, above, below) is another, thinned to one pixel; bool ``[H, W]``."""
    edge = np.zeros(label_map_HW.shape, bool)
    down = label_map_HW[1:] != label_map_HW[:-1]
    right = label_map_HW[:, 1:] != label_map_HW[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return thin_words(edge.astype(np.uint64)) != 0


def read_parts(path: Path) -> Labels | None:
    """The six parts of all people in an annotation of PASCAL-Part, uint8 ``[1, H, W]``; 0 is everything else.

    None if no part of a person is marked.

    Raises:
        FileNotFoundError, ValueError: missing, damaged, of another structure, or with an unknown part.
    """
    anno = read_matlab(path, "anno")
    try:
        objects = anno[0, 0]["objects"].ravel()
        people = [thing for thing in objects if int(thing["class_ind"].item()) == PERSON]
        parts = [(str(part["part_name"].item()), part["mask"]) for one in people for part in _structs(one["parts"])]
    except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: anno is not as in PASCAL-Part ({error})") from error
    labels = np.zeros(parts[0][1].shape if parts else (0, 0), np.uint8)
    for part, mask in parts:
        if part not in PARTS:
            raise ValueError(f"{path}: unknown part {part!r} of a person; known: {', '.join(PARTS)}")
        if mask.shape != labels.shape:
            raise ValueError(f"{path}: masks of parts differ in size, {mask.shape} and {labels.shape}")
        labels[mask.astype(bool)] = PARTS[part]
    return Labels(torch.from_numpy(labels)[None]) if labels.any() else None


def _structs(field: np.ndarray) -> np.ndarray:
    """The elements of a MATLAB struct array, none of an empty matrix."""
    return field.ravel() if field.dtype.names else field.ravel()[:0]
