"""Semantic segmentation: 40 classes on NYUD, 21 on PASCAL-Context."""

from __future__ import annotations

from m3bsr.tasks.base import PixelClasses


class SemSeg(PixelClasses):
    """Cross-entropy over valid pixels; mIoU and pixel accuracy. Targets: class indices ``[B, 1, H, W]``."""

    name = "semseg"

    def __init__(self, num_classes: int = 40, label_smoothing: float = 0.0) -> None:
        super().__init__(num_classes, label_smoothing)
