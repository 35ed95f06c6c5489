"""Binary cross-entropy with class weights: edges (fixed weights) and saliency (weights from the batch)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bsr.losses.resample import check_same_size
from m3bsr.utils.constants import IGNORE


def weighted_bce(prediction: Tensor, target: Tensor, positive_weight: float | Tensor = 0.95) -> Tensor:
    """``sum(w * BCE) / number of valid pixels``, ``w`` = ``positive_weight`` on positives, the rest of 1 on negatives.

    ``prediction``: logits ``[B, 1, H, W]``; ``target [B, 1, H, W]`` in {0, 1} (soft labels count as positive from .5
    on), ``IGNORE`` is invalid.
    """
    check_same_size(prediction, target, "binary cross-entropy")
    target = target.float()
    valid = target != IGNORE
    zero = prediction.new_zeros((), dtype=torch.float32)
    logits = torch.where(valid, prediction.float(), zero)
    labels = torch.where(valid, target, zero)
    weights = torch.where(labels >= 0.5, positive_weight, 1.0 - positive_weight) * valid
    total = F.binary_cross_entropy_with_logits(logits, labels, weight=weights, reduction="sum")
    return total / valid.sum().clamp(min=1)


def balanced_bce(prediction: Tensor, target: Tensor) -> Tensor:
    """:func:`weighted_bce` with the positives weighted by the fraction of negatives among the batch's valid pixels.

    Holistically-nested edge detection (Xie and Tu, 2015), equation 2. A batch without positives (or without
    negatives) therefore gives zero.
    """
    check_same_size(prediction, target, "balanced binary cross-entropy")
    valid = target != IGNORE
    negatives = (valid & (target < 0.5)).sum()
    return weighted_bce(prediction, target, negatives / valid.sum().clamp(min=1))
