"""Data sets and joint transforms. A new data set is one file and one line in ``DATASETS``."""

from __future__ import annotations

from typing import Any

from m3bsr.data.cityscapes import Cityscapes
from m3bsr.data.cub import CUB200
from m3bsr.data.digits import Digits
from m3bsr.data.folder import Folder
from m3bsr.data.image_folder import ImageFolder
from m3bsr.data.nyud import NYUD, Scenes
from m3bsr.data.pascal import PascalContext
from m3bsr.data.torchvision_sets import CIFAR10, CIFAR100, Aircraft, Cars, Flowers102, Food101, Pets
from m3bsr.data.transforms import RECIPES, build_transform

DATASETS: dict[str, type[Any]] = {
    "nyud": NYUD,
    "scenes": Scenes,
    "pascal": PascalContext,
    "cityscapes": Cityscapes,
    "folder": Folder,
    "image_folder": ImageFolder,
    "digits": Digits,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "flowers102": Flowers102,
    "food101": Food101,
    "pets": Pets,
    "aircraft": Aircraft,
    "cars": Cars,
    "cub200": CUB200,
}

__all__ = ["DATASETS", "NYUD", "RECIPES", "Scenes", "build_transform"]
