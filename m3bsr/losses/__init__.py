"""Losses of the dense tasks: pure functions of a prediction and a target, both ``[B, C, H, W]``.

All of them ignore pixels marked ``IGNORE`` (255), compute in float32 whatever the precision of the prediction, and are
zero with a zero gradient (not NaN) when no pixel is valid.
"""

from __future__ import annotations

from m3bsr.losses.binary import balanced_bce, weighted_bce
from m3bsr.losses.classes import cross_entropy
from m3bsr.losses.regression import depth_l1, normals_l1
from m3bsr.losses.resample import at_stride, check_same_size, resize_nearest

__all__ = [
    "at_stride",
    "balanced_bce",
    "check_same_size",
    "cross_entropy",
    "depth_l1",
    "normals_l1",
    "resize_nearest",
    "weighted_bce",
]
