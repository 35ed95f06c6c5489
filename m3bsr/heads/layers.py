"""Pieces that heads share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map ``[B, D, H, W]``; parameters are those of ``nn.LayerNorm(D)``."""

    def forward(self, x_BDHW: Tensor) -> Tensor:
        return super().forward(x_BDHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def resize_bilinear(x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, ``align_corners=False``; the same tensor if it has that size already."""
    if x_BCHW.shape[-2:] == tuple(size):
        return x_BCHW
    return F.interpolate(x_BCHW, size=tuple(size), mode="bilinear", align_corners=False)
