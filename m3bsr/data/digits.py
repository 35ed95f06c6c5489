"""Handwritten digits that come with scikit-learn: 1,797 pictures of 8x8, no download."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from m3bsr.data.labelled import Indices, LabelledImages, held_out

# The last so many of a fixed order are the test split, the fifth before them val.
NUM_TEST, VAL_SHARE = 297, 0.2


class Digits(LabelledImages):
    """scikit-learn's digits: 1,200 train, 300 val, 297 test pictures, grey values made RGB. ``root`` is not read."""

    task_kwargs: ClassVar = {"classification": {"num_classes": 10}}

    def open(self, root: str | Path, split: str) -> Indices:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError("the data set digits needs scikit-learn: pip install scikit-learn") from None
        if split not in ("train", "val", "test"):
            raise ValueError(f"digits has the splits train, val, test; got {split!r}")
        digits = load_digits()
        self.names_of_classes = tuple(map(str, digits.target_names))
        self.grey = torch.from_numpy((digits.images * (255 / 16)).round().astype("uint8"))
        self.labels = digits.target.tolist()
        num = len(self.labels) - NUM_TEST
        return range(num, len(self.labels)) if split == "test" else held_out(num, VAL_SHARE, split)

    def read(self, index: int) -> tuple[Tensor, int, str]:
        return self.grey[index].expand(3, -1, -1), self.labels[index], f"digit-{index}"
