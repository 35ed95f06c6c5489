"""What all data sets with labels per pixel share: images, targets of the same size, splits."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torchvision.transforms.v2.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from m3bsr.data.files import read_image, resolve_root
from m3bsr.data.targets import blank
from m3bsr.data.transforms import Labels, resize
from m3bsr.utils.constants import IGNORE
from m3bsr.utils.lookup import lookup

Transform = Callable[[dict[str, Any]], dict[str, Any]]


class DenseImages(Dataset, ABC):
    """One split of a folder of images with labels per pixel.

    ``dataset[i]`` gives ``image`` float ``[3, H, W]``, one target ``[C, H, W]`` per task (semseg and human_parts int64
    class from 0, depth metres, normals unit vectors, edge and saliency 0 or 1; ``IGNORE`` where invalid, and everywhere
    if the sample has no labels for the task), ``name`` and ``index``.

    Args:
        root: folder; see :func:`m3bsr.data.files.resolve_root`.
        split: name of the split, ``train`` or ``val``.
        tasks: labels to load.
        transform: on the dict of tv_tensors (``m3bsr.data.build_transform``).
        max_samples: only the first so many.
        target_size: ``"network"``: labels are transformed with the image; ``"original"``: they stay as they are on
            disk, for scoring at full resolution; ``"resized:HxW"``: they are resized to H x W, by nearest pixel.
        check: whether all files must be there now. Without it a missing one is an error when it is read.

    Raises:
        FileNotFoundError, ValueError: root, split, label folder or file missing or faulty; names it.
    """

    known_tasks: ClassVar[tuple[str, ...]]
    task_kwargs: ClassVar[dict[str, dict[str, Any]]] = {}
    class_names: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(
        self,
        root: str | Path,
        split: str,
        tasks: Sequence[str],
        *,
        transform: Transform | None = None,
        max_samples: int | None = None,
        target_size: str = "network",
        check: bool = True,
    ) -> None:
        self.resized_to = parse_target_size(target_size)
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be positive, got {max_samples}")
        self.root, self.split, self.tasks = resolve_root(root), split, tuple(tasks)
        self.transform, self.target_size = transform, target_size
        for task in self.tasks:
            lookup(dict.fromkeys(self.known_tasks), task, f"task of {type(self).__name__}")
        self.dense_tasks = tuple(task for task in self.tasks if task != "classification")
        self.names = self.open()[:max_samples]
        if check:
            self.check()

    @abstractmethod
    def open(self) -> list[str]:
        """Look at the folders of the tasks, and return the names of the split's samples."""

    @abstractmethod
    def check(self) -> None:
        """That the files of ``self.names`` are there; they are not opened."""

    @abstractmethod
    def image_file(self, name: str) -> Path:
        """File of an image."""

    @abstractmethod
    def label_file(self, task: str, name: str) -> Path | None:
        """File of a label (the one that errors name); None if the sample has none for the task."""

    @abstractmethod
    def read_target(self, task: str, path: Path, name: str) -> Tensor | None:
        """Target ``[C, H, W]`` of a label type of ``m3bsr.data.transforms``; None if the file has none."""

    @classmethod
    @abstractmethod
    def tasks_in(cls, root: Path) -> tuple[str, ...]:
        """The known tasks that a folder has labels for."""

    def read_image(self, name: str) -> Tensor:
        """Image uint8 ``[3, H, W]``."""
        return read_image(self.image_file(name))

    def stored_size(self, name: str) -> tuple[int, int] | None:
        """Height and width of a sample's files where :meth:`arrange` pads them evenly; None where it does not."""
        return None

    def arrange(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Change image and targets together before any transform, at either ``target_size``."""
        return sample

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        image = tv_tensors.Image(self.read_image(name))
        targets = {task: self._target(task, name, image) for task in self.dense_tasks}
        sample = self.arrange({"image": image, **targets})
        if self.transform is not None and self.target_size == "network":
            sample = self.transform(sample)
        elif self.transform is not None:
            sample |= self.transform({"image": sample["image"]})
        if self.resized_to:
            sample |= resize({task: sample[task] for task in self.dense_tasks}, self.resized_to)
        # Classes travel as uint8, an eighth of the memory to move, and leave as the int64 that losses want.
        tensors = {k: (v.long() if isinstance(v, Labels) else v).as_subclass(Tensor) for k, v in sample.items()}
        return tensors | {"name": name, "index": index}

    def _target(self, task: str, name: str, image: Tensor) -> Tensor:
        path = self.label_file(task, name)
        target = self.read_target(task, path, name) if path is not None else None
        if target is None:
            return blank(task, image.shape[-2:])
        if target.shape[-2:] != image.shape[-2:]:
            turned = target.shape[-2:] == image.shape[:-3:-1]
            raise ValueError(
                f"{path} is {_size(target)} pixels, its image {self.image_file(name)} {_size(image)}"
                + (" (pixels count as they are stored, whatever orientation a camera noted)" if turned else "")
            )
        return target

    def faults(self, index: int) -> list[str]:
        """What is wrong with the files of a sample, a line each: all of them are read."""
        name, found = self.names[index], []
        try:
            image: Tensor | None = self.read_image(name)
        except (ValueError, OSError) as error:
            image = None
            found.append(str(error))
        for task in self.dense_tasks:
            try:
                path = self.label_file(task, name)
                if image is not None:
                    self._target(task, name, image)
                elif path is not None:
                    self.read_target(task, path, name)
            except (ValueError, OSError) as error:
                found.append(str(error))
        return found


def parse_target_size(text: str, name: str = "target_size") -> tuple[int, int] | None:
    """The size in ``"resized:HxW"``; None for ``"network"`` and ``"original"``.

    Raises:
        ValueError: anything else, under ``name``.
    """
    found = re.fullmatch(r"resized:([1-9]\d*)x([1-9]\d*)", text)
    if found is None and text not in ("network", "original"):
        raise ValueError(f"{name} must be network, original or resized:HxW, such as resized:448x448; got {text!r}")
    return (int(found[1]), int(found[2])) if found else None


def pad_evenly(sample: dict[str, Any], multiple: int) -> dict[str, Any]:
    """Pad all sides alike until both lengths are multiples of ``multiple``: mean colour, ``IGNORE`` in labels."""
    height, width = sample["image"].shape[-2:]
    down, across = -height % multiple, -width % multiple
    if not down and not across:
        return sample
    edges = [across // 2, down // 2, across - across // 2, down - down // 2]
    colour = [round(255 * c) for c in IMAGENET_DEFAULT_MEAN]
    return {key: F.pad(value, edges, fill=colour if key == "image" else IGNORE) for key, value in sample.items()}


def trim_evenly(padded: Tensor, size: tuple[int, int]) -> Tensor:
    """What :func:`pad_evenly` was given, ``size`` = (h, w), out of ``[C, H, W]``."""
    top, left = ((full - own) // 2 for full, own in zip(padded.shape[-2:], size, strict=True))
    return padded[..., top : top + size[0], left : left + size[1]]


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-2]}x{picture.shape[-1]}"
