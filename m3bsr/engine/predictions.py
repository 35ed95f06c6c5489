"""Predictions on disk: what ``tools/evaluate.py --save-predictions`` writes and ``tools/score.py`` reads.

``DIR/<task>/<name>.<suffix>``, ``<name>`` as in the data set's split file, at the size of the labels that are scored:

========================  =======  =====================================================================================
semseg, human_parts       ``.png`` uint8 ``[H, W]``: class from 0 (on NYUD 0-39: the raw label minus one)
edge, saliency            ``.png`` uint8 ``[H, W]``: ``floor(255 p)`` of the probability, read as ``value / 255``
depth                     ``.npy`` float32 ``[H, W]``: metres; also read: ``.mat`` with the variable ``depth``
normals                   ``.npy`` float32 ``[H, W, 3]``: unit vectors, axes as in the data set; also read: ``.png``
                                   with ``2 value / 255 - 1``
========================  =======  =====================================================================================

These are the folders and files of the usual multi-task scripts (MTL-PyTorch, M3ViT, InvPT), whose depth is ``.mat``,
whose normals are pictures, and whose folder of saliency is ``sal``, to be renamed; edge pictures go as they are into
the boundary benchmarks. ``predictions.json`` says how they came about.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m3bsr.data.files import read_array, read_grey, read_image
from m3bsr.data.targets import read_matlab
from m3bsr.tasks.base import Task
from m3bsr.utils.foreign import read_object

ABOUT = "predictions.json"


class PredictionWriter:
    """Writes into ``DIR.writing``; ``finish`` renames it, so that ``DIR`` only ever holds a whole set of predictions.

    Raises:
        ValueError: ``DIR`` holds something already, or a task has no answer per pixel.
    """

    def __init__(self, folder: Path, tasks: Mapping[str, Task]) -> None:
        self.folder, self.aside = folder, folder.with_name(folder.name + ".writing")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--save-predictions: {folder} exists already; remove it or name another folder")
        for name, task in tasks.items():
            if not task.dense:
                raise ValueError(f"--save-predictions writes answers per pixel, {name} has one per image")
        shutil.rmtree(self.aside, ignore_errors=True)
        for name in tasks:
            (self.aside / name).mkdir(parents=True)

    def add(self, name: str, task: Task, prediction: Tensor, images: Sequence[str]) -> None:
        """Write raw predictions ``[B, C, H, W]`` of task ``name``."""
        saved = task.to_saved(prediction).cpu().numpy()
        for image, array in zip(images, saved, strict=True):
            array = np.ascontiguousarray(array.transpose(1, 2, 0))
            array = array[..., 0] if array.shape[-1] == 1 else array
            path = self.aside / name / f"{image}{task.saved_suffixes[0]}"
            if path.suffix == ".png":
                Image.fromarray(array).save(path)
            else:
                np.save(path, array)

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write ``predictions.json``, and give the folder its name."""
        (self.aside / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        if self.folder.is_dir():
            self.folder.rmdir()
        os.replace(self.aside, self.folder)


def saved_file(folder: Path, task: str, suffixes: Sequence[str], image: str) -> Path:
    """The file of a prediction; one that is missing by the name that it should have."""
    paths = [folder / task / f"{image}{suffix}" for suffix in suffixes]
    return next((path for path in paths if path.is_file()), paths[0])


def read_saved(task: Task, path: Path) -> Tensor:
    """A saved prediction ``[saved_channels, H, W]``: uint8 of pictures of classes or probabilities, else float32.

    Raises:
        FileNotFoundError, ValueError: missing, damaged, or of another kind.
    """
    if path.suffix == ".npy":
        return read_array(path, task.saved_channels)
    if path.suffix == ".mat":
        array = np.asarray(read_matlab(path, task.name), dtype=np.float32)
        if array.ndim != 2:
            raise ValueError(f"{path}: expected {task.name} [H, W], found shape {array.shape}")
        return torch.from_numpy(np.ascontiguousarray(array))[None]
    return read_grey(path) if task.saved_channels == 1 else 2 * read_image(path).float() / 255 - 1


def check_brightest(brightest: int, folder: Path) -> None:
    """Look at the largest value of all pictures of probabilities in a folder.

    Raises:
        ValueError: it is 1, so they were most likely saved as 0 and 1 instead of 0 to 255.
    """
    if brightest == 1:
        raise ValueError(f"{folder}: no pixel is brighter than 1; probabilities are saved as 255 p, not as 0 and 1")


def read_about(folder: Path) -> dict[str, Any]:
    """``predictions.json`` of a folder; empty where other programs wrote it.

    Raises:
        ValueError: damaged.
    """
    path = folder / ABOUT
    return read_object(path) if path.is_file() else {}
