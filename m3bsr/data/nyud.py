"""NYU Depth v2 in the NYUD_MT layout (and anything else written in it, such as the ray-cast scenes).

``images/*.jpg segmentation/*.png depth/*.npy normals/*.npy edge/*.npy gt_sets/{train,val}.txt``; see
``datasets/nyud/README.md``. Every invalid pixel becomes ``IGNORE`` (255), in every task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from m3bsr.data.files import read_array, read_image, read_labels, read_names, resolve_root
from m3bsr.data.transforms import Depth, Edge, Labels, Normals
from m3bsr.utils.constants import IGNORE
from m3bsr.utils.lookup import lookup

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
    folders: ClassVar[dict[str, str]] = {
        "semseg": "segmentation",
        "depth": "depth",
        "normals": "normals",
        "edge": "edge",
    }

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
        assert target_size in ("network", "original")
        self.root, self.split, self.tasks = resolve_root(root), split, tuple(tasks)
        self.transform, self.target_size = transform, target_size
        for task in self.tasks:
            lookup(self.folders, task, "task of NYUD")
        self._check_folders()
        self.names = read_names(self.root / "gt_sets" / f"{split}.txt")[:max_samples]

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
                    f"{self.root}: {name}: {self.folders[task]} is {target.shape[-2]}x{target.shape[-1]}, "
                    f"the image {image.shape[-2]}x{image.shape[-1]}"
                )
        sample: dict[str, Any] = {"image": image}
        if self.transform is None:
            sample |= targets
        elif self.target_size == "original":
            sample = self.transform(sample) | targets
        else:
            sample = self.transform(sample | targets)
        sample = {key: value.as_subclass(Tensor) for key, value in sample.items()}
        return sample | {"name": name, "index": index}

    def _read(self, task: str, name: str) -> Tensor:
        return getattr(self, f"_read_{task}")(self.root / self.folders[task] / name)

    def _read_semseg(self, stem: Path) -> Labels:
        path = stem.with_name(f"{stem.name}.png")
        raw, num_classes = read_labels(path), self.task_kwargs["semseg"]["num_classes"]
        highest = int(torch.where(raw == IGNORE, 0, raw).max())
        if highest > num_classes:
            raise ValueError(f"{path}: label {highest} is out of range, classes are 1 to {num_classes} and 0 is void")
        return Labels(torch.where((raw == 0) | (raw == IGNORE), IGNORE, raw - 1))

    def _read_depth(self, stem: Path) -> Depth:
        raw = read_array(stem.with_name(f"{stem.name}.npy"), 1)
        return Depth(torch.where(torch.isfinite(raw) & (raw > 0), raw, float(IGNORE)))

    def _read_normals(self, stem: Path) -> Normals:
        raw = read_array(stem.with_name(f"{stem.name}.npy"), 3)
        length = raw.norm(dim=0, keepdim=True)
        valid = torch.isfinite(length) & (length > 0.1)
        return Normals(torch.where(valid, raw / length, float(IGNORE)))

    def _read_edge(self, stem: Path) -> Edge:
        raw = read_array(stem.with_name(f"{stem.name}.npy"), 1)
        return Edge(torch.where(raw == IGNORE, raw, (raw > 0).float()))


class Scenes(NYUD):
    """Ray-cast rooms (``datasets/scenes/make_scenes.py``), written in the same layout with NYUD's class numbers."""
