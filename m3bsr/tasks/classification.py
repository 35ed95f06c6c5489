"""One class per image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3bsr.metrics.accuracy import Accuracy
from m3bsr.tasks.base import Task
from m3bsr.utils.constants import NO_CLASS


class Classification(Task):
    """Cross-entropy; top-1 and top-5 accuracy. Logits ``[B, num_classes]``, targets: class indices ``[B]``.

    Images of class ``NO_CLASS`` (-100, as in PyTorch) do not count. The loss also takes shares of classes
    ``[B, num_classes]`` (mixup), which sum to one, or to less where an image without a class was mixed in.
    """

    name = "classification"
    main_metric = "top1"
    higher_is_better = True
    dense = False

    def __init__(self, num_classes: int = 1000, label_smoothing: float = 0.0) -> None:
        if num_classes < 1:
            raise ValueError(f"{self.name}: num_classes must be positive, got {num_classes}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"{self.name}: label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.num_channels = num_classes
        self.label_smoothing = label_smoothing

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        if target.ndim == 2:
            shares = target.sum(dim=1, keepdim=True)
            smooth = (1 - self.label_smoothing) * target + self.label_smoothing / self.num_channels * shares
            total = F.cross_entropy(prediction.float(), smooth, reduction="sum")
            return total / torch.where(shares.sum() > 0, shares.sum(), 1)
        total = F.cross_entropy(
            prediction.float(), target, ignore_index=NO_CLASS, reduction="sum", label_smoothing=self.label_smoothing
        )
        return total / (target != NO_CLASS).sum().clamp(min=1)

    def metric(self) -> Accuracy:
        return Accuracy(self.num_channels)

    def resize_target(self, target: Tensor, size: tuple[int, int]) -> Tensor:
        """A class has no size."""
        return target

    def example_target(self, batch_size: int, size: tuple[int, int]) -> Tensor:
        return torch.zeros(batch_size, dtype=torch.int64)

    def colour(self, x: Any, is_prediction: bool = False) -> np.ndarray:
        raise ValueError("a class is no picture; show its name")
