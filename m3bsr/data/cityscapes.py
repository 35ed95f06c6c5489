"""Cityscapes in the small form of MTAN (Liu, Johns and Davison, CVPR 2019): arrays of 128x256, seven classes.

``{train,val}/{image,label_7,depth}/{i}.npy``; see ``datasets/cityscapes/README.md``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from m3bsr.data.dense import DenseImages
from m3bsr.data.files import check_files, read_array
from m3bsr.data.targets import depth_target
from m3bsr.data.transforms import InverseDepth, Labels
from m3bsr.utils.constants import IGNORE

FOLDERS = {"semseg": "label_7", "depth": "depth"}
# Far above any inverse depth of a street, far below IGNORE.
MAX_INVERSE_DEPTH = 10.0


class Cityscapes(DenseImages):
    """One split; see :class:`m3bsr.data.dense.DenseImages` for arguments and samples.

    ``depth`` is what the arrays hold: inverse depth without a unit, so a zoom multiplies it. Names are the numbers of
    the files.
    """

    known_tasks: ClassVar[tuple[str, ...]] = ("semseg", "depth")
    # Published errors of about .015 absolute and 30 % relative put the mean near .05.
    task_kwargs: ClassVar[dict[str, dict[str, Any]]] = {
        "semseg": {"num_classes": 7},
        "depth": {"max_depth": 0.5, "mean_depth": 0.05},
    }
    class_names: ClassVar[dict[str, tuple[str, ...]]] = {
        "semseg": ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
    }

    def open(self) -> list[str]:
        self.folder = self.root / self.split
        if not (self.folder / "image").is_dir():
            has = sorted(path.name for path in self.root.iterdir() if (path / "image").is_dir())
            raise FileNotFoundError(f"{self.folder} has no folder image (splits there: {', '.join(has) or 'none'})")
        for task in self.tasks:
            if not (self.folder / FOLDERS[task]).is_dir():
                raise FileNotFoundError(f"{self.folder} has no folder {FOLDERS[task]}, needed for task {task}")
        names = [os.path.splitext(entry)[0] for entry in os.listdir(self.folder / "image") if entry.endswith(".npy")]
        if not names:
            raise ValueError(f"{self.folder / 'image'} holds no .npy file")
        return sorted(names, key=lambda name: (len(name), name))

    @classmethod
    def tasks_in(cls, root: Path) -> tuple[str, ...]:
        return tuple(task for task, folder in FOLDERS.items() if (root / "train" / folder).is_dir())

    def check(self) -> None:
        for task in self.tasks:
            check_files(self.names, self.folder / FOLDERS[task], ".npy", self.folder / "image")

    def image_file(self, name: str) -> Path:
        return self.folder / "image" / f"{name}.npy"

    def label_file(self, task: str, name: str) -> Path:
        return self.folder / FOLDERS[task] / f"{name}.npy"

    def read_image(self, name: str) -> Tensor:
        """Values from 0 to 1 (or to 255) as uint8."""
        path = self.image_file(name)
        raw = read_array(path, 3)
        raw = raw * 255 if raw.max() <= 1 else raw
        if not (raw.isfinite().all() and raw.min() >= 0 and raw.max() <= 255):
            raise ValueError(
                f"{path}: values from 0 to 1 are expected, found {raw.min() / 255:g} to {raw.max() / 255:g}"
            )
        return raw.round().to(torch.uint8)

    def read_target(self, task: str, path: Path, name: str) -> Tensor:
        raw = read_array(path, 1)
        if task == "depth":
            return InverseDepth(depth_target(raw, path, MAX_INVERSE_DEPTH, "inverse depths").as_subclass(Tensor))
        # -1 is void.
        known = np.isin(raw.numpy(), [-1, IGNORE, *range(self.task_kwargs["semseg"]["num_classes"])])
        if not known.all():
            raise ValueError(f"{path}: label {raw.numpy()[~known][0]:g} is out of range; known: -1-6, 255")
        return Labels(torch.where(raw < 0, IGNORE, raw).to(torch.uint8))
