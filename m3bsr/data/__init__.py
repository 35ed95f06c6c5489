"""Data sets and joint transforms. A new data set is one file and one line in ``DATASETS``."""

from __future__ import annotations

from m3bsr.data.nyud import NYUD, Scenes
from m3bsr.data.transforms import RECIPES, build_transform

DATASETS: dict[str, type[NYUD]] = {"nyud": NYUD, "scenes": Scenes}

__all__ = ["DATASETS", "NYUD", "RECIPES", "Scenes", "build_transform"]
