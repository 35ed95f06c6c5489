"""What all classification data sets share: images, one class each, fixed splits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from m3bsr.data.image_transforms import IMAGE_RECIPES
from m3bsr.utils.lookup import lookup

Transform = Callable[[dict[str, Any]], dict[str, Any]]
Indices = Sequence[int]


class LabelledImages(Dataset):
    """Images with one class each; ``dataset[i]`` gives ``image`` float ``[3, H, W]``, ``classification`` (a class
    index, int64 scalar), ``name`` and ``index``.

    Args:
        root: folder of the data; see :func:`m3bsr.data.files.resolve_root`.
        split: ``train``, ``val`` or ``test``. A model is chosen on ``val`` and reported on ``test``.
        tasks: ``("classification",)``.
        transform: on the dict of tv_tensors (``m3bsr.data.build_transform``).
        max_samples: only so many, spread evenly over the split.
        target_size: read by dense data sets only: a class has no size.

    Raises:
        FileNotFoundError, ValueError: root, split or file missing or faulty; names it.
    """

    known_tasks: ClassVar[tuple[str, ...]] = ("classification",)
    task_kwargs: ClassVar[dict[str, dict[str, Any]]] = {}
    recipes: ClassVar[dict[str, Any]] = IMAGE_RECIPES
    names_of_classes: Sequence[str]

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        tasks: Sequence[str] = ("classification",),
        *,
        transform: Transform | None = None,
        max_samples: int | None = None,
        target_size: str = "network",
    ) -> None:
        for task in tasks:
            lookup(dict.fromkeys(self.known_tasks), task, f"task of {type(self).__name__}")
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be positive, got {max_samples}")
        self.root, self.split, self.transform = Path(root), split, transform
        indices = self.open(root, split)
        if not len(indices):
            raise ValueError(f"{root}: split {split!r} holds no image")
        self.indices = spread(indices, max_samples)

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        return {"classification": tuple(self.names_of_classes)}

    @abstractmethod
    def open(self, root: str | Path, split: str) -> Indices:
        """Find the images of a split and set ``names_of_classes``; what comes back is passed to :meth:`read`."""

    @abstractmethod
    def read(self, index: int) -> tuple[Tensor, int, str]:
        """Image uint8 ``[3, H, W]``, class index, name."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label, name = self.read(self.indices[index])
        sample: dict[str, Any] = {"image": tv_tensors.Image(image)}
        if self.transform is not None:
            sample = self.transform(sample)
        return {
            "image": sample["image"].as_subclass(Tensor),
            "classification": torch.tensor(label),
            "name": name,
            "index": index,
        }


def spread(indices: Indices, num: int | None) -> Indices:
    """``num`` of the indices, evenly spaced: the first so many of a sorted folder would be one class."""
    if num is None or num >= len(indices):
        return indices
    return [indices[i * len(indices) // num] for i in range(num)]


def held_out(num: int, share: float, split: str, seed: int = 0) -> list[int]:
    """Indices of the ``train`` or ``val`` part of ``num`` images, for sets without a val split; always the same."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed)).tolist()
    num_val = max(1, round(num * share))
    return sorted(order[:num_val] if split == "val" else order[num_val:])
