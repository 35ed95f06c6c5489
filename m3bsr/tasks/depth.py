"""Monocular depth in metres."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from m3bsr.losses import depth_l1
from m3bsr.metrics.depth import DepthErrors
from m3bsr.tasks.base import Task, to_float_array
from m3bsr.utils.constants import IGNORE

# Nine equally spaced colours of viridis (matplotlib, CC0): perceptually even, and readable in grey.
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    dtype=np.float32,
)


class Depth(Task):
    """L1 over valid pixels; rmse and relative errors. Targets in metres ``[B, 1, H, W]``.

    ``max_depth`` (metres) is the far end of the colour scale only, fixed so that panels compare. ``mean_depth`` is
    where a fresh head starts (2.7 m is the mean of NYUD).
    """

    name = "depth"
    num_channels = 1
    main_metric = "rmse"
    higher_is_better = False
    saved_suffixes = (".npy", ".mat")
    default_weight = 1.0

    def __init__(self, max_depth: float = 10.0, mean_depth: float = 2.7) -> None:
        if max_depth <= 0:
            raise ValueError(f"depth: max_depth must be positive, got {max_depth}")
        self.max_depth = max_depth
        self.output_bias = mean_depth

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return depth_l1(prediction, target)

    def metric(self) -> DepthErrors:
        return DepthErrors()

    def colour(self, x: Any, is_prediction: bool = False) -> np.ndarray:
        """Viridis from 0 m (dark) to ``max_depth`` (bright); invalid pixels are black."""
        metres = to_float_array(x, 1, self.name)[0]
        position = np.clip(metres / self.max_depth, 0, 1) * (len(_VIRIDIS) - 1)
        grid = np.arange(len(_VIRIDIS))
        channels = [np.interp(position, grid, _VIRIDIS[:, c]) for c in range(3)]
        picture = np.round(np.stack(channels, axis=-1)).astype(np.uint8)
        if not is_prediction:
            picture[metres == IGNORE] = 0
        return picture
