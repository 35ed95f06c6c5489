"""What a task is: the number of channels, a loss, a metric, and how it looks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3bsr.losses import cross_entropy, resize_nearest
from m3bsr.metrics.base import Metric
from m3bsr.metrics.miou import MeanIoU
from m3bsr.utils.constants import IGNORE


class Task(ABC):
    """One task. Subclasses are one file each, named in ``m3bsr.tasks.TASKS``.

    Predictions are raw network outputs ``[B, num_channels, H, W]``; targets are ``[B, C, H, W]`` with ``IGNORE``
    (255) at invalid pixels. A task with ``dense = False`` has one answer per image instead: ``[B, num_channels]`` and
    ``[B]``. The metric applies argmax, sigmoid or normalisation itself.
    """

    name: str
    num_channels: int
    main_metric: str
    higher_is_better: bool
    dense: bool = True
    """Whether there is an answer per pixel, or one per image."""
    default_weight: float = 1.0
    output_bias: float = 0.0
    """Where a fresh head's output should start: near the mean of the target if that is far from zero."""
    slow_metric: bool = False
    """Whether scoring an image takes long enough to be worth another process."""
    saved_suffixes: tuple[str, ...] = (".npy",)
    """Files that a saved prediction is read from (see ``engine.predictions``); the first is what is written."""
    saved_channels: int = 1
    """Channels of a saved prediction."""

    @abstractmethod
    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Scalar; zero with zero gradient when nothing is valid. ValueError if batch or size differ."""

    @abstractmethod
    def metric(self) -> Metric:
        """A new accumulator: ``update(prediction, target)``, ``compute() -> dict``."""

    @abstractmethod
    def colour(self, x: Any, is_prediction: bool = False) -> np.ndarray:
        """uint8 ``[H, W, 3]`` of a target, or of a raw output (``is_prediction=True``), ``[C, H, W]``."""

    def mirrored(self, x: Tensor) -> Tensor:
        """A dense prediction or target ``[..., H, W]`` as it would be of the mirrored image."""
        return x.flip(-1) if self.dense else x

    def average(self, predictions: Sequence[Tensor]) -> Tensor:
        """One raw prediction from several of the same image, all of one shape."""
        return torch.stack(tuple(predictions)).mean(dim=0)

    def to_saved(self, prediction: Tensor) -> Tensor:
        """What is saved of raw predictions ``[B, C, H, W]``: here as they are, float32."""
        return prediction.float()

    def add_saved(self, metric: Any, saved: Tensor, target: Tensor) -> None:
        """Score saved predictions ``[B, saved_channels, H, W]`` by a metric of this task.

        Raises:
            ValueError: values that a saved prediction of this task cannot have.
        """
        if not saved.isfinite().all():
            raise ValueError("holds NaN or infinity")
        metric.update(saved, target)

    def resize_target(self, target: Tensor, size: tuple[int, int]) -> Tensor:
        """The target at ``size = (h, w)`` for a loss at lower resolution; nearest samples, never blended."""
        return resize_nearest(target, size)

    def example_target(self, batch_size: int, size: tuple[int, int]) -> Tensor:
        """A valid target of zeros ``[batch_size, C, h, w]``, to measure costs without data."""
        return torch.zeros(batch_size, 1, *size)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, num_channels={self.num_channels})"


class PixelClasses(Task):
    """One of ``num_classes`` classes per pixel. Targets: class indices ``[B, 1, H, W]``."""

    main_metric = "miou"
    higher_is_better = True
    saved_suffixes = (".png",)

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        if not 1 <= num_classes <= IGNORE:
            raise ValueError(f"{self.name}: num_classes must be in 1..{IGNORE}, got {num_classes}")
        self.num_channels = num_classes
        self.label_smoothing = label_smoothing

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(prediction, target, self.label_smoothing)

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


def to_bytes(logits: Tensor) -> Tensor:
    """Probabilities ``p`` of logits as uint8 ``floor(255 p)``: the published scripts cut off too.

    Read as ``value / 255`` it lies at most 1 / 255 below ``p``.
    """
    return (255 * logits.double().sigmoid()).to(torch.uint8)


def to_float_array(x: Any, channels: int | tuple[int, ...], name: str) -> np.ndarray:
    """``[C, H, W]`` (tensor or array, any device) as float32 numpy; ValueError if the channels are not as expected."""
    array = x.detach().float().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, dtype=np.float32)
    allowed = (channels,) if isinstance(channels, int) else channels
    if array.ndim != 3 or array.shape[0] not in allowed:
        raise ValueError(f"cannot colour {name}: expected [C, H, W] with C in {allowed}, got shape {array.shape}")
    return array


def label_palette(num_classes: int) -> np.ndarray:
    """Distinct uint8 colours ``[256, 3]``, the same on every run; ``IGNORE`` and unused entries are black.

    The bits of the index are spread over the three channels, highest first, as in the PASCAL VOC colour map; here the
    index starts at 1, because NYUD has no background class that should be black.
    """
    palette = np.zeros((256, 3), dtype=np.uint8)
    for label in range(min(num_classes, IGNORE)):
        index = label + 1
        for bit in range(8):
            for channel in range(3):
                palette[label, channel] |= ((index >> channel) & 1) << (7 - bit)
            index >>= 3
    return palette


def colour_labels(x: Any, num_classes: int, name: str, is_prediction: bool) -> np.ndarray:
    """Class labels ``[1, H, W]`` or logits ``[num_classes, H, W]`` in the palette's colours."""
    if is_prediction:
        labels = to_float_array(x, num_classes, name).argmax(axis=0)
    else:
        labels = to_float_array(x, 1, name)[0].astype(np.int64)
    return label_palette(num_classes)[np.clip(labels, 0, 255)]


def colour_grey(x: Any, name: str, is_prediction: bool) -> np.ndarray:
    """A probability ``[1, H, W]`` in grey, white = 1; logits pass a sigmoid first. Invalid pixels are dark red."""
    values = to_float_array(x, 1, name)[0]
    invalid = np.zeros(values.shape, dtype=bool) if is_prediction else values == IGNORE
    shown = 1 / (1 + np.exp(-np.clip(values, -50, 50))) if is_prediction else np.clip(values, 0, 1)
    picture = np.repeat(np.round(shown * 255).astype(np.uint8)[..., None], 3, axis=-1)
    picture[invalid] = (96, 0, 0)
    return picture
