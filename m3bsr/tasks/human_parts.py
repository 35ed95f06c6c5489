"""Human part segmentation: six parts and background (PASCAL-Context)."""

from __future__ import annotations

from m3bsr.tasks.base import PixelClasses


class HumanParts(PixelClasses):
    """Cross-entropy and mIoU over 7 classes. An image without people comes as ``IGNORE`` everywhere."""

    name = "human_parts"
    default_weight = 2.0

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__(num_classes)
