"""Depth errors pooled over all valid pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3bsr.losses.resample import check_same_size
from m3bsr.metrics.base import SumMetric, count, ratio, real
from m3bsr.utils.constants import IGNORE

MIN_DEPTH = 1e-3
"""Metres. A network may predict zero or less, where logarithm and ratio have no value; such depths count as this."""

NAMES = ("squared", "log_squared", "abs_rel", "sq_rel")


class DepthErrors(SumMetric):
    """Root mean square error (metres), the same of natural logarithms, relative errors and ``delta < 1.25^k``.

    Eigen et al. 2014. ``update`` takes prediction and target ``[B, 1, H, W]`` in metres. A pixel is valid where the
    target is positive and not ``IGNORE``; every number is pooled over pixels, not averaged over images. The
    prediction is floored at :data:`MIN_DEPTH` for ``log_rmse`` and the deltas only.
    """

    def __init__(self) -> None:
        super().__init__(pixels=count(), within=count(3), **{name: real() for name in NAMES})

    def update(self, prediction: Tensor, target: Tensor) -> None:
        check_same_size(prediction, target, "depth metrics")
        valid = (target != IGNORE) & (target > 0)
        predicted, true = prediction.detach()[valid].double(), target[valid].double()
        positive = predicted.clamp(min=MIN_DEPTH)
        squared = (predicted - true).square()
        self.sums.add("pixels", valid.sum())
        self.sums.add("squared", squared.sum())
        self.sums.add("log_squared", (positive.log() - true.log()).square().sum())
        self.sums.add("abs_rel", ((predicted - true).abs() / true).sum())
        self.sums.add("sq_rel", (squared / true).sum())
        factor = torch.maximum(positive / true, true / positive)
        self.sums.add("within", torch.stack([(factor < 1.25**k).sum() for k in (1, 2, 3)]))

    def compute(self) -> dict[str, float]:
        """``rmse log_rmse abs_rel sq_rel delta1 delta2 delta3``; NaN if no valid pixel was seen."""
        mean = {name: ratio(self.sums[name], self.sums["pixels"]) for name in NAMES}
        within = [ratio(self.sums["within"][k], self.sums["pixels"]) for k in range(3)]
        return {
            "rmse": math.sqrt(mean["squared"]),
            "log_rmse": math.sqrt(mean["log_squared"]),
            "abs_rel": mean["abs_rel"],
            "sq_rel": mean["sq_rel"],
            "delta1": within[0],
            "delta2": within[1],
            "delta3": within[2],
        }
