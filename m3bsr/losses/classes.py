"""Cross-entropy over classes for semantic segmentation and human parts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from m3bsr.losses.resample import check_same_size
from m3bsr.utils.constants import IGNORE


def cross_entropy(prediction: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over valid pixels.

    ``prediction``: logits ``[B, C, H, W]``; ``target``: class indices ``[B, 1, H, W]``, ``IGNORE`` is invalid.
    """
    check_same_size(prediction, target, "cross-entropy")
    labels = target[:, 0].long()
    total = F.cross_entropy(
        prediction.float(), labels, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (labels != IGNORE).sum().clamp(min=1)
