"""NYU Depth v2 in the NYUD_MT layout (and anything else written in it, such as the ray-cast scenes).

``images/*.jpg segmentation/*.png depth/*.npy normals/*.npy edge/*.npy gt_sets/{train,val}.txt``; see
``datasets/nyud/README.md``. Every invalid pixel becomes ``IGNORE`` (255), in every task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from m3bsr.data.files import check_files, read_array, read_image, read_labels, read_names, resolve_root
from m3bsr.data.transforms import Depth, Edge, Labels, Normals
from m3bsr.utils.constants import IGNORE
from m3bsr.utils.lookup import lookup

# Clothes, "refridgerator" and all: the names (and their spelling) of the usual 40 classes.
NYUD_CLASSES = (
    "wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain dresser "
    "pillow mirror floor_mat clothes ceiling books refridgerator television paper towel shower_curtain box whiteboard "
    "person night_stand toilet sink lamp bathtub bag otherstructure otherfurniture otherprop"
)
MAX_DEPTH = 100.0
"""Metres; more is another unit (millimetres), and would come near ``IGNORE`` in a zoom."""

Transform = Callable[[dict[str, Any]], dict[str, Any]]


class NYUD(Dataset):
    """One split of a folder in NYUD_MT layout.

    ``dataset[i]`` gives ``image`` float ``[3, H, W]``, one target ``[C, H, W]`` per task (semseg int64 class from 0,
    depth metres, normals unit vectors, edge 0 or 1; ``IGNORE`` where invalid), ``name`` and ``index``.

    Args:
        root: folder; see :func:`m3bsr.data.files.resolve_root`.
        split: name of the file in ``gt_sets``.
        tasks: labels to load.
        transform: on the dict of tv_tensors (``m3bsr.data.build_transform``).
        max_samples: only the first so many.
        target_size: ``"network"``: labels are transformed with the image; ``"original"``: they stay as they are on
            disk, for scoring at full resolution.

    Raises:
        FileNotFoundError, ValueError: root, split, label folder or file missing or faulty; names it.
    """

    known_tasks: ClassVar[tuple[str, ...]] = ("semseg", "depth", "normals", "edge")
    task_kwargs: ClassVar[dict[str, dict[str, Any]]] = {"semseg": {"num_classes": 40}, "edge": {"max_dist": 0.011}}
    class_names: ClassVar[dict[str, tuple[str, ...]]] = {
        "semseg": tuple(name.replace("_", " ") for name in NYUD_CLASSES.split())
    }
    folders: ClassVar[dict[str, str]] = {
        "semseg": "segmentation",
        "depth": "depth",
        "normals": "normals",
        "edge": "edge",
    }
    suffixes: ClassVar[dict[str, str]] = {"semseg": ".png", "depth": ".npy", "normals": ".npy", "edge": ".npy"}

    def __init__(
        self,
        root: str | Path,
        split: str,
        tasks: Sequence[str],
        *,
        transform: Transform | None = None,
        max_samples: int | None = None,
        target_size: str = "network",
    ) -> None:
        if target_size not in ("network", "original"):
            raise ValueError(f"target_size must be network or original, got {target_size!r}")
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be positive, got {max_samples}")
        self.root, self.split, self.tasks = resolve_root(root), split, tuple(tasks)
        self.transform, self.target_size = transform, target_size
        for task in self.tasks:
            lookup(self.folders, task, "task of NYUD")
        self._check_folders()
        split_file = self.root / "gt_sets" / f"{split}.txt"
        self.names = read_names(split_file)[:max_samples]
        check_files(self.names, self.root / "images", ".jpg", split_file)
        for task in self.tasks:
            check_files(self.names, self.root / self.folders[task], self.suffixes[task], split_file)

    def _check_folders(self) -> None:
        if not (self.root / "images").is_dir():
            raise FileNotFoundError(f"{self.root} has no folder images: not in NYUD_MT layout")
        has = [task for task, folder in self.folders.items() if (self.root / folder).is_dir()]
        for task in self.tasks:
            if task not in has:
                raise FileNotFoundError(
                    f"{self.root} has no folder {self.folders[task]}, needed for task {task}; "
                    f"tasks with labels there: {', '.join(has) or 'none'}"
                )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        image = tv_tensors.Image(read_image(self.root / "images" / f"{name}.jpg"))
        targets = {task: self._read(task, name) for task in self.tasks}
        for task, target in targets.items():
            if target.shape[-2:] != image.shape[-2:]:
                raise ValueError(
                    f"{self._path(task, name)} is {_size(target)} pixels, its image {self.root / 'images' / name}.jpg "
                    f"{_size(image)}"
                )
        sample: dict[str, Any] = {"image": image}
        if self.transform is None:
            sample |= targets
        elif self.target_size == "original":
            sample = self.transform(sample) | targets
        else:
            sample = self.transform(sample | targets)
        # Classes travel as uint8, an eighth of the memory to move, and leave as the int64 that losses want.
        tensors = {k: (v.long() if isinstance(v, Labels) else v).as_subclass(Tensor) for k, v in sample.items()}
        return tensors | {"name": name, "index": index}

    def _path(self, task: str, name: str) -> Path:
        return self.root / self.folders[task] / f"{name}{self.suffixes[task]}"

    def _read(self, task: str, name: str) -> Tensor:
        read: Callable[[Path], Tensor] = getattr(self, f"_read_{task}")
        return read(self._path(task, name))

    def _read_semseg(self, path: Path) -> Labels:
        """0 is void and the classes count from 1; 255 is taken as void too."""
        num_classes = self.task_kwargs["semseg"]["num_classes"]
        table = np.full(256, -1, np.int16)
        table[[0, IGNORE]] = IGNORE
        table[1 : num_classes + 1] = np.arange(num_classes)
        return Labels(read_labels(path, table))

    def _read_depth(self, path: Path) -> Depth:
        """Metres; 0, negative, NaN and infinite are holes, and so is 255."""
        raw = read_array(path, 1)
        valid = torch.isfinite(raw) & (raw > 0) & (raw != IGNORE)
        depth = torch.where(valid, raw, float(IGNORE))
        wrong = valid & (depth > MAX_DEPTH)
        if wrong.any():
            raise ValueError(
                f"{path}: depth {raw[wrong][0]:g} is out of range, metres up to {MAX_DEPTH:g} are expected"
            )
        return Depth(depth)

    def _read_normals(self, path: Path) -> Normals:
        """Unit vectors; zero vectors, NaN and (255, 255, 255) are holes."""
        raw = read_array(path, 3)
        length = raw.norm(dim=0, keepdim=True)
        valid = torch.isfinite(length) & (length > 0.1) & ~(raw == IGNORE).all(dim=0, keepdim=True)
        wrong = valid & (length > 2)
        if wrong.any():
            raise ValueError(f"{path}: a normal of length {length[wrong][0]:g}, unit vectors are expected")
        return Normals(torch.where(valid, raw / length, float(IGNORE)))

    def _read_edge(self, path: Path) -> Edge:
        """Above 0 is an edge, NaN a hole; 255 is a hole too, but in a file without any other value it is the edge."""
        raw = read_array(path, 1)
        hole = raw == IGNORE
        if hole.any() and not ((raw > 0) & ~hole).any():
            hole = torch.zeros_like(hole)
        return Edge(torch.where(hole | raw.isnan(), float(IGNORE), (raw > 0).float()))


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-2]}x{picture.shape[-1]}"


class Scenes(NYUD):
    """Ray-cast rooms (``datasets/scenes/make_scenes.py``), written in the same layout with NYUD's class numbers."""
