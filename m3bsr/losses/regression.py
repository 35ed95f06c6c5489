"""L1 losses: metric depth, and surface normals as unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from m3bsr.losses.resample import check_same_size
from m3bsr.utils.constants import IGNORE

# Bounds the gradient of the normalisation where a predicted vector vanishes (1 / 1e-4 instead of infinity), and moves
# a vector of length 0.1 by no more than one part in two million.
NORM_EPS = 1e-4


def masked_l1(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``|prediction - target|`` over the elements where ``valid``; all of one shape. 0 if there are none."""
    # Both are replaced before the subtraction: an infinity times zero in the backward pass would be NaN.
    zero = prediction.new_zeros(())
    difference = torch.where(valid, prediction, zero) - torch.where(valid, target, zero)
    return difference.abs().sum() / valid.sum().clamp(min=1)


def depth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error in metres over valid pixels; both ``[B, 1, H, W]``, invalid where the target is 255."""
    check_same_size(prediction, target, "depth loss")
    target = target.float()
    return masked_l1(prediction.float(), target, target != IGNORE)


def unit_vectors(vectors: Tensor) -> Tensor:
    """``vectors [B, 3, H, W]`` scaled to length one (a zero vector stays zero)."""
    return vectors / (vectors.square().sum(dim=1, keepdim=True) + NORM_EPS**2).sqrt()


def normals_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the unit normals over valid *elements* (three a pixel; MTL-PyTorch's convention).

    ``prediction [B, 3, H, W]`` of any length is normalised, ``target [B, 3, H, W]`` is taken as it is; a pixel with
    ``IGNORE`` in any channel is invalid. Implementations that divide by valid pixels instead have a loss three times
    larger, so their loss weights do not carry over.
    """
    check_same_size(prediction, target, "normals loss")
    target = target.float()
    valid = (target != IGNORE).all(dim=1, keepdim=True).expand_as(target)
    safe = torch.where(valid, prediction.float(), prediction.new_zeros((), dtype=torch.float32))
    return masked_l1(unit_vectors(safe), target, valid)
