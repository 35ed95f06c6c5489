"""Any folder of images, one sub-folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from m3bsr.data.files import read_image, resolve_root
from m3bsr.data.labelled import Indices, LabelledImages, held_out

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
# Share of the images that are held out where there is no val folder.
VAL_SHARE = 0.2


class ImageFolder(LabelledImages):
    """``root/{train,val,test}/<class>/*.jpg``, or ``root/<class>/*.jpg`` of which a fixed fifth is ``val``.

    Classes are the sub-folders of ``train`` in alphabetical order; see :class:`LabelledImages` for the rest.
    """

    def open(self, root: str | Path, split: str) -> Indices:
        self.root = resolve_root(root)
        self.names_of_classes = class_folders(self.root)
        folder = self.root / split if is_split(self.root) else self.root
        if not folder.is_dir():
            has = sorted(path.name for path in self.root.iterdir() if path.is_dir())
            raise FileNotFoundError(f"{self.root} has no folder {split}; it has {', '.join(has)}")
        unknown = sorted(set(sub_folders(folder)) - set(self.names_of_classes))
        if unknown:
            raise ValueError(f"{folder}: {unknown[0]} is a folder, but no class of {self.root / 'train'}")
        self.files = [
            (path, label)
            for label, name in enumerate(self.names_of_classes)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        ]
        if folder == self.root and split in ("train", "val"):
            return held_out(len(self.files), VAL_SHARE, split)
        return range(len(self.files)) if folder != self.root else []

    def read(self, index: int) -> tuple[Tensor, int, str]:
        path, label = self.files[index]
        return read_image(path), label, str(path.relative_to(self.root))

    @classmethod
    def read_task_kwargs(cls, root: str | Path) -> dict[str, dict[str, Any]]:
        """Number of classes, from the folder."""
        return {"classification": {"num_classes": len(class_folders(resolve_root(root)))}}


def is_split(root: Path) -> bool:
    """Whether ``root`` holds splits, not classes."""
    return (root / "train").is_dir()


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the classes of a root folder, in order.

    Raises:
        ValueError: no sub-folder.
    """
    folder = root / "train" if is_split(root) else root
    names = tuple(sub_folders(folder))
    if not names:
        raise ValueError(f"{folder} holds no sub-folder; an image folder has one per class")
    return names


def sub_folders(folder: Path) -> list[str]:
    """Names of the sub-folders in order, without hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
