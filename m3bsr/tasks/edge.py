"""Boundary detection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from m3bsr.losses import weighted_bce
from m3bsr.metrics.edges import EdgeCounts, EdgeScores, edge_counts
from m3bsr.tasks.base import Task, colour_grey, to_bytes


class Edge(Task):
    """Weighted binary cross-entropy (.95 / .05); odsF, oisF and AP. Targets ``[B, 1, H, W]`` in {0, 1}.

    ``max_dist`` is the matching tolerance as a fraction of the image diagonal: .011 on NYUD, .0075 on PASCAL and
    BSDS. ``thresholds`` trades the metric's time for resolution (the benchmark uses 99). ``counter``: see
    ``EdgeScores``.
    """

    name = "edge"
    num_channels = 1
    main_metric = "ods_f"
    higher_is_better = True
    saved_suffixes = (".png",)
    slow_metric = True
    default_weight = 50.0

    def __init__(
        self,
        max_dist: float = 0.011,
        thresholds: int = 99,
        positive_weight: float = 0.95,
        counter: Callable[..., EdgeCounts] = edge_counts,
    ) -> None:
        if not 0 < positive_weight < 1:
            raise ValueError(f"edge: positive_weight must be between 0 and 1, got {positive_weight}")
        self.max_dist, self.thresholds, self.positive_weight = max_dist, thresholds, positive_weight
        self.counter = counter

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return weighted_bce(prediction, target, self.positive_weight)

    def metric(self) -> EdgeScores:
        return EdgeScores(max_dist=self.max_dist, thresholds=self.thresholds, counter=self.counter)

    def to_saved(self, prediction: Tensor) -> Tensor:
        """``floor(255 p)``, uint8."""
        return to_bytes(prediction)

    def add_saved(self, metric: EdgeScores, saved: Tensor, target: Tensor) -> None:
        for p, t in zip(saved[:, 0].double().numpy() / 255, target.numpy(), strict=True):
            metric.update_probability(p, t)

    def colour(self, x: Any, is_prediction: bool = False) -> np.ndarray:
        return colour_grey(x, self.name, is_prediction)
