"""Angles between predicted and true surface normals, in degrees, in constant memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3bsr.losses.resample import check_same_size
from m3bsr.metrics.base import SumMetric, count, ratio, real
from m3bsr.utils.constants import IGNORE

THRESHOLDS = (11.25, 22.5, 30.0)
BINS_PER_DEGREE = 100
"""Resolution of the histogram behind the median: it is off by at most one bin, 0.01 degrees."""


def angles_between(prediction: Tensor, target: Tensor) -> Tensor:
    """Angles in degrees between vectors in dimension 1 (``[B, 3, ...] -> [B, ...]``), computed in float64.

    ``2 atan2(|p - g|, |p + g|)`` of the unit vectors is exact near 0 and 180 degrees, where ``acos`` of a rounded dot
    product loses half of its digits. A zero vector is at 90 degrees to everything.
    """
    p = torch.nn.functional.normalize(prediction.double(), dim=1)
    g = torch.nn.functional.normalize(target.double(), dim=1)
    return torch.rad2deg(2 * torch.atan2((p - g).norm(dim=1), (p + g).norm(dim=1)))


class NormalAngles(SumMetric):
    """Mean, median and root-mean-square angle; shares under 11.25, 22.5 and 30 degrees.

    ``update`` takes raw outputs and targets ``[B, 3, H, W]``, of any length; a pixel with ``IGNORE`` in any channel is
    invalid. ``rmse`` is the root of the mean squared angle (some published code returns the mean under that name).
    """

    def __init__(self) -> None:
        super().__init__(
            pixels=count(),
            angle=real(),
            squared=real(),
            within=count(len(THRESHOLDS)),
            histogram=count(180 * BINS_PER_DEGREE),
        )

    def update(self, prediction: Tensor, target: Tensor) -> None:
        check_same_size(prediction, target, "normals metrics")
        valid = (target != IGNORE).all(dim=1)
        angle = angles_between(prediction.detach().movedim(1, -1)[valid], target.movedim(1, -1)[valid])
        bins = (angle * BINS_PER_DEGREE).long().clamp(max=180 * BINS_PER_DEGREE - 1)
        self.sums.add("pixels", valid.sum())
        self.sums.add("angle", angle.sum())
        self.sums.add("squared", angle.square().sum())
        self.sums.add("within", torch.stack([(angle < limit).sum() for limit in THRESHOLDS]))
        self.sums.add("histogram", torch.bincount(bins, minlength=180 * BINS_PER_DEGREE))

    def _median(self) -> float:
        pixels = int(self.sums["pixels"])
        if not pixels:
            return float("nan")
        running = self.sums["histogram"].cumsum(0)
        index = int(torch.searchsorted(running, torch.tensor((pixels + 1) // 2)))
        return (index + 0.5) / BINS_PER_DEGREE

    def compute(self) -> dict[str, float]:
        """``mean median rmse`` in degrees, ``within_11.25 within_22.5 within_30`` in 0..1; NaN without pixels."""
        pixels = self.sums["pixels"]
        within = self.sums["within"]
        shares = {f"within_{limit:g}": ratio(n, pixels) for limit, n in zip(THRESHOLDS, within, strict=True)}
        return {
            "mean": ratio(self.sums["angle"], pixels),
            "median": self._median(),
            "rmse": math.sqrt(ratio(self.sums["squared"], pixels)),
            **shares,
        }
