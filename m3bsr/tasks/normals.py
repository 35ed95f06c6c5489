"""Surface normals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3bsr.losses import normals_l1
from m3bsr.losses.regression import unit_vectors
from m3bsr.metrics.normals import NormalAngles
from m3bsr.tasks.base import Task, to_float_array
from m3bsr.utils.constants import IGNORE


class Normals(Task):
    """L1 of unit vectors; angles in degrees. Targets are unit vectors ``[B, 3, H, W]``."""

    name = "normals"
    num_channels = 3
    main_metric = "mean"
    higher_is_better = False
    saved_suffixes = (".npy", ".png")
    saved_channels = 3
    default_weight = 10.0

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return normals_l1(prediction, target)

    def metric(self) -> NormalAngles:
        return NormalAngles()

    def mirrored(self, x: Tensor) -> Tensor:
        """x points the other way in a mirror; invalid pixels of targets stay marked."""
        x = x.flip(-1)
        sign = x.new_tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
        return torch.where((x == IGNORE).all(dim=-3, keepdim=True), x, sign * x)

    def average(self, predictions: Sequence[Tensor]) -> Tensor:
        """The mean of unit vectors: a long raw vector must not outvote a short one."""
        return super().average([unit_vectors(p.float()) for p in predictions])

    def to_saved(self, prediction: Tensor) -> Tensor:
        """Unit vectors, float32."""
        return F.normalize(prediction.float(), dim=1)

    def example_target(self, batch_size: int, size: tuple[int, int]) -> Tensor:
        return torch.zeros(batch_size, 3, *size)

    def colour(self, x: Any, is_prediction: bool = False) -> np.ndarray:
        """``(n + 1) / 2`` of the unit vectors as RGB; invalid pixels are black."""
        vectors = to_float_array(x, 3, self.name)
        invalid = np.zeros(vectors.shape[1:], dtype=bool) if is_prediction else (vectors == IGNORE).any(axis=0)
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=0, keepdims=True), 1e-6)
        picture = np.round((unit + 1) / 2 * 255).astype(np.uint8).transpose(1, 2, 0)
        picture[invalid] = 0
        return picture
