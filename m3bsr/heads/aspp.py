"""Atrous spatial pyramid pooling: one map looked at with several field sizes at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3bsr.heads.base import DenseHead, check_width
from m3bsr.heads.layers import ChannelNorm

# Of DeepLabv3 for maps of 1/16: a 3x3 kernel with dilation 18 sees 37x37 patches.
DILATIONS = (6, 12, 18)


class ASPPHead(DenseHead):
    """LayerNorm, 1x1 to ``head_dim``; 1x1, dilated 3x3 and the mean of the image side by side; 1x1, 3x3, 1x1, resize.

    After DeepLabv3 (Chen et al. 2017), with three differences: the branches read ``head_dim`` channels, not those of
    the backbone; GroupNorm stands for BatchNorm, whose pooled branch cannot train on one image; no dropout.
    ``forward(x_BDHW, size)``: tokens on their grid ``[B, embed_dim, h, w]`` to logits ``[B, num_channels, *size]``. At
    480x640 (grid 30x40) with ``embed_dim=384``, ``head_dim=128`` and 40 classes it costs 0.89 GMACs (``light`` 0.19).
    """

    def __init__(self, embed_dim: int, num_channels: int, head_dim: int = 128) -> None:
        super().__init__()
        check_width("aspp", head_dim)
        self.norm = ChannelNorm(embed_dim, eps=1e-6)
        self.project = nn.Conv2d(embed_dim, head_dim, 1)
        self.branches = nn.ModuleList(
            [_conv(head_dim, head_dim, 1, 1), *(_conv(head_dim, head_dim, 3, d) for d in DILATIONS)]
        )
        # A map of one pixel has nothing to normalise over.
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(head_dim, head_dim, 1), nn.GELU())
        self.merge = _conv(head_dim * (len(self.branches) + 1), head_dim, 1, 1)
        self.refine = _conv(head_dim, head_dim, 3, 1)
        self.logits = nn.Conv2d(head_dim, num_channels, 1)

    def features(self, x: Tensor) -> Tensor:
        x = F.gelu(self.project(self.norm(x)))
        views = [branch(x) for branch in self.branches]
        views.append(self.pooled(x).expand_as(x))
        return self.refine(self.merge(torch.cat(views, dim=1)))


def _conv(width_in: int, width: int, kernel: int, dilation: int) -> nn.Sequential:
    """Convolution that keeps the size, GroupNorm, GELU."""
    conv = nn.Conv2d(width_in, width, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(math.gcd(width, 8), width), nn.GELU())
