"""NYU Depth v2 in both packagings (and anything else written in them, such as the ray-cast scenes).

``images segmentation depth normals edge gt_sets/{train,val}.txt``; which files these folders hold is said by
``NYUD_MT``, ``NYUDV2`` and ``datasets/nyud/README.md``. Every invalid pixel becomes ``IGNORE`` (255), in every task.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from m3bsr.data.dense import DenseImages, pad_evenly
from m3bsr.data.files import check_files, picture_size, read_names
from m3bsr.data.targets import (
    class_table,
    read_classes,
    read_depth,
    read_edge,
    read_mask,
    read_normals,
    read_normals_picture,
)
from m3bsr.utils.constants import IGNORE
from m3bsr.utils.log import get_logger

log = get_logger(__name__)

# Clothes, "refridgerator" and all: the names (and their spelling) of the usual 40 classes.
NYUD_CLASSES = (
    "wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain dresser "
    "pillow mirror floor_mat clothes ceiling books refridgerator television paper towel shower_curtain box whiteboard "
    "person night_stand toilet sink lamp bathtub bag otherstructure otherfurniture otherprop"
)
CLASS_TABLE = class_table(40, first=1, void=(0, IGNORE))
FOLDERS = {"semseg": "segmentation", "depth": "depth", "normals": "normals", "edge": "edge"}


@dataclass(frozen=True)
class Packaging:
    """How files are written: suffix of images, suffix and reader of each label."""

    name: str
    image_suffix: str
    labels: Mapping[str, tuple[str, Callable[[Path], Tensor]]]
    multiple: int = 1
    """Sides are padded to multiples of it, as those who use the packaging do before the network."""


def _read_semseg(path: Path) -> Tensor:
    return read_classes(path, CLASS_TABLE)


NYUD_MT = Packaging(
    "NYUD_MT (ASTMT)",
    ".jpg",
    {
        "semseg": (".png", _read_semseg),
        "depth": (".npy", read_depth),
        "normals": (".npy", read_normals),
        "edge": (".npy", read_edge),
    },
)
# 425x560 becomes 448x576.
NYUDV2 = Packaging(
    "NYUDv2 (ATRC)",
    ".png",
    {
        "semseg": (".png", _read_semseg),
        "depth": (".npy", read_depth),
        "normals": (".png", read_normals_picture),
        "edge": (".png", read_mask),
    },
    multiple=32,
)


def find_packaging(root: Path, tasks: tuple[str, ...]) -> Packaging:
    """The packaging of a folder, by the suffixes of its images and of the labels of ``tasks``.

    Raises:
        ValueError: images of one packaging beside labels of the other.
    """
    images = _suffixes(root / "images")
    found = NYUDV2 if NYUDV2.image_suffix in images and NYUD_MT.image_suffix not in images else NYUD_MT
    other = NYUD_MT if found is NYUDV2 else NYUDV2
    for task in tasks:
        suffix, there = found.labels[task][0], _suffixes(root / FOLDERS[task])
        if suffix not in there and other.labels[task][0] in there:
            raise ValueError(
                f"{root} mixes two packagings: images are {found.image_suffix} as in {found.name}, yet "
                f"{FOLDERS[task]} holds {other.labels[task][0]} as in {other.name}; see datasets/nyud/README.md"
            )
    return found


@functools.cache
def _say(root: Path, packaging: str) -> None:
    """Once for all splits of a folder."""
    log.info("%s: packaging %s", root, packaging)


def _suffixes(folder: Path) -> set[str]:
    return {os.path.splitext(entry)[1].lower() for entry in os.listdir(folder)}


class NYUD(DenseImages):
    """One split of a folder in either packaging; see :class:`m3bsr.data.dense.DenseImages` for arguments and samples.

    Samples of NYUDv2 are padded from 425x560 to 448x576 (image mean colour, labels ``IGNORE``), at both target sizes.
    """

    known_tasks: ClassVar[tuple[str, ...]] = ("semseg", "depth", "normals", "edge")
    task_kwargs: ClassVar[dict[str, dict[str, Any]]] = {"semseg": {"num_classes": 40}, "edge": {"max_dist": 0.011}}
    class_names: ClassVar[dict[str, tuple[str, ...]]] = {
        "semseg": tuple(name.replace("_", " ") for name in NYUD_CLASSES.split())
    }

    def open(self) -> list[str]:
        if not (self.root / "images").is_dir():
            raise FileNotFoundError(f"{self.root} has no folder images: not in NYUD_MT layout")
        has = self.tasks_in(self.root)
        for task in self.tasks:
            if task not in has:
                raise FileNotFoundError(
                    f"{self.root} has no folder {FOLDERS[task]}, needed for task {task}; "
                    f"tasks with labels there: {', '.join(has) or 'none'}"
                )
        self.packaging = find_packaging(self.root, self.tasks)
        _say(self.root, self.packaging.name)
        names = read_names(self.split_file)
        if self.resized_to and self.resized_to == self.stored_size(names[0]):
            raise ValueError(
                f"{self.target_size} is the size of the files of {self.packaging.name}, whose padded labels would be "
                "squeezed into it: original scores the same pixels, and takes saved predictions of this size"
            )
        return names

    @classmethod
    def tasks_in(cls, root: Path) -> tuple[str, ...]:
        return tuple(task for task, folder in FOLDERS.items() if (root / folder).is_dir())

    @property
    def split_file(self) -> Path:
        return self.root / "gt_sets" / f"{self.split}.txt"

    def check(self) -> None:
        check_files(self.names, self.root / "images", self.packaging.image_suffix, self.split_file)
        for task in self.tasks:
            check_files(self.names, self.root / FOLDERS[task], self.packaging.labels[task][0], self.split_file)

    def image_file(self, name: str) -> Path:
        return self.root / "images" / f"{name}{self.packaging.image_suffix}"

    def label_file(self, task: str, name: str) -> Path:
        return self.root / FOLDERS[task] / f"{name}{self.packaging.labels[task][0]}"

    def read_target(self, task: str, path: Path, name: str) -> Tensor:
        return self.packaging.labels[task][1](path)

    def stored_size(self, name: str) -> tuple[int, int] | None:
        return picture_size(self.image_file(name)) if self.packaging.multiple > 1 else None

    def arrange(self, sample: dict[str, Any]) -> dict[str, Any]:
        return pad_evenly(sample, self.packaging.multiple)


class Scenes(NYUD):
    """Ray-cast rooms (``datasets/scenes/make_scenes.py``), written in the same layout with NYUD's class numbers."""
