"""Streaming metrics. All hold sums of constant size, so they merge and reduce over processes by addition."""

from __future__ import annotations

from m3bsr.metrics.accuracy import Accuracy
from m3bsr.metrics.base import Metric, reduce_over_processes
from m3bsr.metrics.delta_m import delta_m, relative_gains
from m3bsr.metrics.depth import DepthErrors
from m3bsr.metrics.edges import EdgeScores
from m3bsr.metrics.miou import MeanIoU
from m3bsr.metrics.normals import NormalAngles
from m3bsr.metrics.saliency import SaliencyScores

__all__ = [
    "Accuracy",
    "DepthErrors",
    "EdgeScores",
    "MeanIoU",
    "Metric",
    "NormalAngles",
    "SaliencyScores",
    "delta_m",
    "reduce_over_processes",
    "relative_gains",
]
