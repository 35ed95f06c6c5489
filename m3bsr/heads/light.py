"""A decoder that costs a few percent of the backbone."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from m3bsr.heads.base import DenseHead, check_width
from m3bsr.heads.layers import ChannelNorm


class SeparableBlock(nn.Module):
    """``x + GELU(norm(pointwise(depthwise 3x3(x))))`` on ``[B, C, H, W]``.

    GroupNorm, not BatchNorm: heads train with whatever batch fits, down to one image, and score the same in training
    and evaluation.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.norm = nn.GroupNorm(math.gcd(width, 8), width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + F.gelu(self.norm(self.pointwise(self.depthwise(x_BCHW))))


class LightHead(DenseHead):
    """LayerNorm, 1x1 to ``head_dim``, separable block, bilinear x2, separable block, 1x1 logits, one resize.

    ``forward(x_BDHW, size)``: tokens on their grid ``[B, embed_dim, h, w]`` to logits ``[B, num_channels, *size]``.
    At 480x640 (grid 30x40) with ``embed_dim=384``, ``head_dim=128`` and 40 classes it costs 0.19 GMACs (the upsample
    head 61.3, ViT-S 39.1). What remains expensive is not here but in full-size logits and their loss: ask for a
    smaller ``size`` in training (``loss.stride``) and for the full one in evaluation.
    """

    def __init__(self, embed_dim: int, num_channels: int, head_dim: int = 128) -> None:
        super().__init__()
        check_width("light", head_dim)
        self.norm = ChannelNorm(embed_dim, eps=1e-6)
        self.project = nn.Conv2d(embed_dim, head_dim, 1)
        self.coarse = SeparableBlock(head_dim)
        self.fine = SeparableBlock(head_dim)
        self.logits = nn.Conv2d(head_dim, num_channels, 1)

    def features(self, x: Tensor) -> Tensor:
        x = self.coarse(self.project(self.norm(x)))
        return self.fine(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
