"""Salient object detection (PASCAL-Context)."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from m3bsr.losses import balanced_bce
from m3bsr.metrics.saliency import SaliencyScores
from m3bsr.tasks.base import Task, colour_grey, to_bytes


class Saliency(Task):
    """Balanced binary cross-entropy; best F-measure and mIoU. Targets ``[B, 1, H, W]`` in {0, 1}."""

    name = "saliency"
    num_channels = 1
    main_metric = "miou"
    higher_is_better = True
    saved_suffixes = (".png",)
    default_weight = 5.0

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return balanced_bce(prediction, target)

    def metric(self) -> SaliencyScores:
        return SaliencyScores()

    def to_saved(self, prediction: Tensor) -> Tensor:
        """``floor(255 p)``, uint8."""
        return to_bytes(prediction)

    def add_saved(self, metric: SaliencyScores, saved: Tensor, target: Tensor) -> None:
        metric.update_probability(saved.double() / 255, target)

    def colour(self, x: Any, is_prediction: bool = False) -> np.ndarray:
        return colour_grey(x, self.name, is_prediction)
