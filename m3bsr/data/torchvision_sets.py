"""Classification benchmarks through torchvision's readers; ``datasets/classification/prepare.py`` downloads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torchvision.datasets as tv
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from m3bsr.data.files import resolve_root
from m3bsr.data.labelled import Indices, LabelledImages, held_out
from m3bsr.utils.foreign import one_line

# Share of the training images that are held out as val where the benchmark has no val split of its own.
VAL_SHARE = 0.1


class TorchvisionImages(LabelledImages):
    """A benchmark read by torchvision. Subclasses name the reader and what it calls its splits.

    Where the benchmark has no val split a fixed tenth of its training images is ``val``, so that ``test`` is never
    used to choose a model.
    """

    reader: ClassVar[Callable[..., Any]]
    arguments: ClassVar[dict[str, dict[str, Any]]]
    """Per split the reader's arguments; ``val`` is missing where it is held out of ``train``."""

    def open(self, root: str | Path, split: str) -> Indices:
        root = resolve_root(root)
        holds_out = split == "val" and "val" not in self.arguments
        if split not in self.arguments and not holds_out:
            raise ValueError(f"{type(self).__name__} has the splits train, val, test; got {split!r}")
        try:
            self.images = type(self).reader(root, download=False, **self.arguments["train" if holds_out else split])
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{type(self).__name__}: {root} does not hold the data (or it is damaged: {error}); "
                f"datasets/classification/prepare.py downloads it"
            ) from None
        self.names_of_classes = tuple(self.images.classes)
        if "val" not in self.arguments and split in ("train", "val"):
            return held_out(len(self.images), VAL_SHARE, split)
        return range(len(self.images))

    def read(self, index: int) -> tuple[Tensor, int, str]:
        name = f"{type(self).__name__.lower()}-{self.split}-{index}"
        try:
            picture, label = self.images[index]
            return pil_to_tensor(picture.convert("RGB")), label, name
        except Exception as error:  # a damaged file fails in many ways; Pillow refuses bombs by itself
            raise ValueError(f"cannot read image {name} of {self.root}: {one_line(error)}") from None


_TRAIN_TEST: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAIN_VAL_TEST = {**_TRAIN_TEST, "val": {"split": "val"}}


class CIFAR10(TorchvisionImages):
    """CIFAR-10. Its files are pickles; torchvision reads them only if their MD5 is the published one."""

    reader = tv.CIFAR10
    arguments: ClassVar = {"train": {"train": True}, "test": {"train": False}}
    task_kwargs: ClassVar = {"classification": {"num_classes": 10}}


class CIFAR100(TorchvisionImages):
    """CIFAR-100; see :class:`CIFAR10`."""

    reader = tv.CIFAR100
    arguments: ClassVar = {"train": {"train": True}, "test": {"train": False}}
    task_kwargs: ClassVar = {"classification": {"num_classes": 100}}


class Flowers102(TorchvisionImages):
    """Oxford Flowers-102: 1,020 train, 1,020 val, 6,149 test images."""

    reader = tv.Flowers102
    arguments: ClassVar = _TRAIN_VAL_TEST
    task_kwargs: ClassVar = {"classification": {"num_classes": 102}}

    def open(self, root: str | Path, split: str) -> Indices:
        indices = super().open(root, split)
        self.names_of_classes = tuple(getattr(self.images, "classes", None) or map(str, range(102)))
        return indices


class Food101(TorchvisionImages):
    """Food-101."""

    reader = tv.Food101
    arguments: ClassVar = _TRAIN_TEST
    task_kwargs: ClassVar = {"classification": {"num_classes": 101}}


class Pets(TorchvisionImages):
    """Oxford-IIIT Pets, 37 breeds."""

    reader = tv.OxfordIIITPet
    arguments: ClassVar = {"train": {"split": "trainval"}, "test": {"split": "test"}}
    task_kwargs: ClassVar = {"classification": {"num_classes": 37}}


class Aircraft(TorchvisionImages):
    """FGVC Aircraft, 100 variants."""

    reader = tv.FGVCAircraft
    arguments: ClassVar = _TRAIN_VAL_TEST
    task_kwargs: ClassVar = {"classification": {"num_classes": 100}}


class Cars(TorchvisionImages):
    """Stanford Cars, 196 models. Its original links are dead: put the files in place by hand."""

    reader = tv.StanfordCars
    arguments: ClassVar = _TRAIN_TEST
    task_kwargs: ClassVar = {"classification": {"num_classes": 196}}
