"""Recipes for images with one class each. Random numbers come from torch, as in ``m3bsr.data.transforms``: timm's
operations draw from Python and numpy, which are seeded from torch for each image."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as v2
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision import tv_tensors

Sample = dict[str, Any]
Steps = list[Callable[[Sample], Sample]]


class OnImage:
    """A torchvision transform of the image, the rest as it is."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, sample: Sample) -> Sample:
        return {**sample, "image": self.transform(sample["image"])}


def whole(size: tuple[int, int]) -> Steps:
    """The shorter side at ``size``, then the middle: what validation sees."""
    return [OnImage(_Cover(size))]


class _Cover:
    """The smallest resize that covers ``size``, and its middle."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        height, width = image.shape[-2:]
        scale = max(self.size[0] / height, self.size[1] / width)
        sides = [max(full, round(side * scale)) for full, side in zip(self.size, (height, width), strict=True)]
        return v2.functional.center_crop(v2.functional.resize(image, sides, BICUBIC, antialias=True), list(self.size))


def middle(photo: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The part of a photo ``[H, W, 3]`` that :func:`whole` shows the network, at the photo's own resolution."""
    height, width = photo.shape[:2]
    scale = min(height / size[0], width / size[1])
    rows, columns = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (height - rows) // 2, (width - columns) // 2
    return photo[top : top + rows, left : left + columns]


BICUBIC = v2.InterpolationMode.BICUBIC


def _flip(size: tuple[int, int]) -> Steps:
    return [OnImage(v2.RandomHorizontalFlip()), *whole(size)]


def _crop(size: tuple[int, int]) -> Steps:
    crop = v2.RandomResizedCrop(list(size), scale=(0.35, 1.0), interpolation=BICUBIC, antialias=True)
    return [OnImage(crop), OnImage(v2.RandomHorizontalFlip())]


RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
"""timm's name of DeiT's recipe: two operations of magnitude 9, each taken with probability one half."""


class RandAugment:
    """timm's RandAugment of a uint8 image ``[3, H, W]``; borders that it uncovers are filled with the mean colour."""

    def __init__(self, config: str = RAND_AUGMENT) -> None:
        grey = (124, 116, 104)  # ImageNet's mean, as timm has it
        self.transform = rand_augment_transform(config, {"img_mean": grey, "translate_const": 100})

    def __call__(self, image: Tensor) -> Tensor:
        picture = v2.functional.to_pil_image(image)
        with seeded_from_torch():
            picture = self.transform(picture)
        return tv_tensors.Image(v2.functional.pil_to_tensor(picture))


@contextmanager
def seeded_from_torch() -> Iterator[None]:
    """Python's and numpy's random numbers follow torch's inside, and go on as they were behind."""
    seed = int(torch.randint(2**31, ()))
    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _rand_augment(size: tuple[int, int]) -> Steps:
    return [*_crop(size), OnImage(RandAugment())]


# Training recipes by name; validation always uses "none".
IMAGE_RECIPES: dict[str, Callable[[tuple[int, int]], Steps]] = {
    "none": whole,
    "flip": _flip,
    "crop": _crop,  # random part of 35 to 100 % of the area, flip
    "rand_augment": _rand_augment,  # crop, then timm's RandAugment with DeiT's settings
}
