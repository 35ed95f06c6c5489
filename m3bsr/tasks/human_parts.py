"""Human part segmentation: six parts and background (PASCAL-Context)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3bsr.losses import cross_entropy
from m3bsr.metrics.miou import MeanIoU
from m3bsr.tasks.base import Task, colour_labels


class HumanParts(Task):
    """Cross-entropy and mIoU over 7 classes. An image without people comes as ``IGNORE`` everywhere."""

    name = "human_parts"
    main_metric = "miou"
    higher_is_better = True
    saved_suffixes = (".png",)
    default_weight = 2.0

    def __init__(self, num_classes: int = 7) -> None:
        self.num_channels = num_classes

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(prediction, target)

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
