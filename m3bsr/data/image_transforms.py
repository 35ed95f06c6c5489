"""Recipes for images with one class each. Random numbers come from torch alone, as in ``m3bsr.data.transforms``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torchvision.transforms.v2 as v2

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


def _rand_augment(size: tuple[int, int]) -> Steps:
    return [*_crop(size), OnImage(v2.RandAugment(num_ops=2, magnitude=9))]


# Training recipes by name; validation always uses "none".
IMAGE_RECIPES: dict[str, Callable[[tuple[int, int]], Steps]] = {
    "none": whole,
    "flip": _flip,
    "crop": _crop,  # random part of 35 to 100 % of the area, flip
    "rand_augment": _rand_augment,  # crop, then two random operations
}
