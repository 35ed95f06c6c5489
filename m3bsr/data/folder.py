"""Own data without code: a folder of images, and a folder of labels for each task that there are labels for.

``images/*`` beside any of ``semseg human_parts depth normals edge saliency`` and ``classification.csv``; see
``datasets/folder/README.md``. A label belongs to the image of the same name; images without one train the other tasks.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from m3bsr.data.dense import DenseImages
from m3bsr.data.files import read_array, read_labels, read_names, read_text, resolve_root
from m3bsr.data.image_folder import SUFFIXES, VAL_SHARE
from m3bsr.data.targets import class_table, depth_target, read_depth, read_edge, read_mask, read_normals
from m3bsr.data.targets import read_normals_picture as read_normals_png
from m3bsr.data.transforms import Labels
from m3bsr.utils.constants import IGNORE, NO_CLASS
from m3bsr.utils.log import get_logger

log = get_logger(__name__)

ANY_CLASS = class_table(IGNORE)
WITH_CLASSES = ("semseg", "human_parts")
CLASSES_FILE = "classification.csv"


def _read_class_array(path: Path) -> Tensor:
    raw = read_array(path, 1)
    wrong = (raw != raw.round()) | (raw < 0) | (raw > IGNORE)
    if wrong.any():
        raise ValueError(f"{path}: label {raw[wrong][0]:g} is out of range; known: whole numbers 0-255")
    return Labels(raw.to(torch.uint8))


def _read_millimetres(path: Path) -> Tensor:
    # Only 16 bits make sense: 8 would end at 25 cm, and are somebody's colour scale.
    raw = read_labels(path, np.arange(2**16, dtype=np.int32), dtype=np.float32)
    if raw.max() <= IGNORE and raw.any():
        raise ValueError(f"{path}: depth beyond 25 cm is expected, in a picture of 16 bits in millimetres")
    return depth_target(raw / 1000, path)


def _read_class_picture(path: Path) -> Tensor:
    return Labels(read_labels(path, ANY_CLASS))


# How each kind of file is read: task -> suffix -> reader.
READERS: dict[str, dict[str, Callable[[Path], Tensor]]] = {
    "semseg": {".png": _read_class_picture, ".npy": _read_class_array},
    "human_parts": {".png": _read_class_picture, ".npy": _read_class_array},
    "depth": {".npy": read_depth, ".png": _read_millimetres},
    "normals": {".npy": read_normals, ".png": read_normals_png},
    "edge": {".png": read_mask, ".npy": read_edge, ".jpg": read_mask},
    "saliency": {".png": read_mask, ".npy": read_edge, ".jpg": read_mask},
}


class Folder(DenseImages):
    """One split of a folder of own data; see :class:`m3bsr.data.dense.DenseImages` for arguments and samples.

    ``classification`` gives an int64 scalar, ``NO_CLASS`` for images that are not in the table. ``class_names`` holds
    the tasks whose classes have names: in ``<task>.txt``, one a line, or in the table.
    """

    known_tasks: ClassVar[tuple[str, ...]] = (*READERS, "classification")
    task_kwargs: ClassVar[dict[str, dict[str, Any]]] = {}

    def open(self) -> list[str]:
        self.images = _by_name(self.root / "images", SUFFIXES)
        if not self.images:
            raise ValueError(f"{self.root / 'images'} holds no image; known: {', '.join(SUFFIXES)}")
        has = self.tasks_in(self.root)
        for task in self.tasks:
            if task not in has:
                what = CLASSES_FILE if task == "classification" else f"folder {task}"
                raise FileNotFoundError(
                    f"{self.root} has no {what}, needed for task {task}; tasks with labels there: "
                    f"{', '.join(has) or 'none'}"
                )
        self.labels = {task: _by_name(self.root / task, tuple(READERS[task])) for task in self.dense_tasks}
        self.classes = read_classes_of(self.root) if "classification" in self.tasks else {}
        names = {task: names_of(self.root, task) for task in WITH_CLASSES}
        self.class_names = {task: found for task, found in names.items() if found}  # type: ignore[misc]
        if self.classes:
            self.class_names["classification"] = tuple(sorted(set(self.classes.values())))
        return split_names(self.root, self.split, sorted(self.images))

    @classmethod
    def tasks_in(cls, root: Path) -> tuple[str, ...]:
        there = [task for task in READERS if (root / task).is_dir()]
        return (*there, "classification") if (root / CLASSES_FILE).is_file() else tuple(there)

    def check(self) -> None:
        missing = [name for name in self.names if name not in self.images]
        if missing:
            raise FileNotFoundError(
                f"missing file: {self.root / 'images' / missing[0]}.*, listed in splits/{self.split}.txt"
                + (f", and {len(missing) - 1} more of {len(self.names)}" if len(missing) > 1 else "")
            )
        for task in self.tasks:
            labels = self.classes if task == "classification" else self.labels[task]
            num = sum(name in labels for name in self.names)
            if num == 0:
                example = f": it names {min(labels)!r}, images {self.names[0]!r}" if labels else ""
                raise ValueError(f"{self.root}: no image of split {self.split} has a label of {task}{example}")
            if num < len(self.names):
                log.info("%s, %s: %d of %d images have %s", self.root, self.split, num, len(self.names), task)

    def image_file(self, name: str) -> Path:
        return self.images.get(name, self.root / "images" / f"{name}.*")

    def label_file(self, task: str, name: str) -> Path | None:
        return self.labels[task].get(name)

    def read_target(self, task: str, path: Path, name: str) -> Tensor:
        target = READERS[task][path.suffix.lower()](path)
        names = self.class_names.get(task, ()) if task in WITH_CLASSES else ()
        if names and (wrong := (target != IGNORE) & (target >= len(names))).any():
            raise ValueError(f"{path}: label {int(target[wrong][0])} is out of range; {task}.txt names {len(names)}")
        return target

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if "classification" in self.tasks:
            label = self.classes.get(sample["name"])
            known = self.class_names["classification"]
            sample["classification"] = torch.tensor(NO_CLASS if label is None else known.index(label))
        return sample

    @classmethod
    def read_task_kwargs(cls, root: str | Path) -> dict[str, dict[str, Any]]:
        """Number of classes of each task that has some: as many as there are names, or the highest label plus one."""
        root = resolve_root(root)
        found = {}
        for task in set(WITH_CLASSES) & set(cls.tasks_in(root)):
            found[task] = {"num_classes": len(names_of(root, task)) or highest_label(root / task) + 1}
        if (root / CLASSES_FILE).is_file():
            found["classification"] = {"num_classes": len(set(read_classes_of(root).values()))}
        return found


def split_names(root: Path, split: str, images: list[str]) -> list[str]:
    """Names in ``splits/<split>.txt``; without that folder a fifth of the images is ``val``, chosen by their names.

    The choice hangs on each name alone, nearly: more images later leave nearly all others where they are.
    """
    if (root / "splits").is_dir():
        return read_names(root / "splits" / f"{split}.txt")
    if split not in ("train", "val"):
        raise ValueError(f"{root} has no folder splits, so there are only train and val, no {split!r}")
    if len(images) < 2:
        raise ValueError(f"{root / 'images'} holds one image, too few to train and validate")
    order = sorted(images, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    held_out = set(order[: max(1, round(len(order) * VAL_SHARE))])
    return [name for name in images if (name in held_out) == (split == "val")]


def names_of(root: Path, task: str) -> tuple[str, ...]:
    """Names of the classes of a task, from ``<task>.txt``; empty without it."""
    path = root / f"{task}.txt"
    if not path.is_file():
        return ()
    names = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: expected the names of the classes, one a line, each once")
    return names


def highest_label(folder: Path) -> int:
    """Highest class in the labels of a folder; all files are read, once for each state of the folder.

    Raises:
        ValueError: a faulty file, or no label at all.
    """
    return _highest_label(folder, folder.stat().st_mtime_ns)


@functools.cache
def _highest_label(folder: Path, _changed: int) -> int:
    highest, readers = -1, READERS["semseg"]
    for path in tqdm(_by_name(folder, tuple(readers)).values(), desc=f"classes of {folder.name}", leave=False):
        labels = readers[path.suffix.lower()](path)
        highest = max(highest, int(torch.where(labels == IGNORE, 0, labels + 1).max()) - 1)
    if highest < 0:
        raise ValueError(f"{folder} holds no label; known: {', '.join(readers)}, classes from 0, 255 for none")
    return highest


def read_classes_of(root: Path) -> dict[str, str]:
    """``classification.csv``: lines of image name (with or without suffix) and class.

    Raises:
        ValueError: not two columns, or an image twice.
    """
    path, classes = root / CLASSES_FILE, {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(_rows(file, path), start=1):
            row = [cell.strip() for cell in row]
            if not any(row) or (number == 1 and row == ["name", "class"]):
                continue
            if len(row) != 2 or not all(row):
                raise ValueError(
                    f"{path}, line {number}: expected an image name and its class, found {','.join(row)!r}"
                )
            stem, suffix = os.path.splitext(row[0])
            name = stem if suffix.lower() in SUFFIXES else row[0]
            if name in classes:
                raise ValueError(f"{path}, line {number}: {name!r} has a class already")
            classes[name] = row[1]
    return classes


def _rows(file: Iterable[str], path: Path) -> Iterator[list[str]]:
    try:
        yield from csv.reader(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file: {error}") from None


def _by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files of a folder by their name without suffix.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: two files of one name, or a label in a format that cannot hold it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.parent} has no folder {folder.name}; see datasets/folder/README.md")
    found: dict[str, Path] = {}
    for entry in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(entry)
        if entry.startswith(".") or (suffix.lower() not in SUFFIXES and suffix.lower() not in suffixes):
            continue
        if suffix.lower() not in suffixes:
            raise ValueError(f"{folder / entry}: {folder.name} is read from {' or '.join(suffixes)} only")
        if stem in found:
            raise ValueError(f"{folder} holds both {found[stem].name} and {entry}")
        found[stem] = folder / entry
    return found
