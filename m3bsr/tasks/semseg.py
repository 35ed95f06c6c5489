"""Semantic segmentation: 40 classes on NYUD, 21 on PASCAL-Context."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3bsr.losses import cross_entropy
from m3bsr.metrics.miou import MeanIoU
from m3bsr.tasks.base import Task, colour_labels


class SemSeg(Task):
    """Cross-entropy over valid pixels; mIoU and pixel accuracy. Targets: class indices ``[B, 1, H, W]``."""

    name = "semseg"
    main_metric = "miou"
    higher_is_better = True
    saved_suffixes = (".png",)
    default_weight = 1.0

    def __init__(self, num_classes: int = 40, label_smoothing: float = 0.0) -> None:
        if not 1 <= num_classes <= 255:
            raise ValueError(f"{self.name}: num_classes must be in 1..255, got {num_classes}")
        self.num_channels = num_classes
        self.label_smoothing = label_smoothing

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(prediction, target, self.label_smoothing)

    def metric(self) -> MeanIoU:
        return MeanIoU(self.num_channels)

    def to_saved(self, prediction: Tensor) -> Tensor:
        """Classes from 0, uint8."""
        return prediction.argmax(dim=1, keepdim=True).to(torch.uint8)

    def add_saved(self, metric: MeanIoU, saved: Tensor, target: Tensor) -> None:
        metric.update_labels(saved, target)

    def example_target(self, batch_size: int, size: tuple[int, int]) -> Tensor:
        return torch.zeros(batch_size, 1, *size, dtype=torch.int64)

    def colour(self, x: Any, is_prediction: bool = False) -> np.ndarray:
        return colour_labels(x, self.num_channels, self.name, is_prediction)
