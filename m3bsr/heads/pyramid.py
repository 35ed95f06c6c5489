"""A feature pyramid made of the last features alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from m3bsr.heads.base import DenseHead, check_width
from m3bsr.heads.layers import ChannelNorm, resize_bilinear
from m3bsr.heads.light import SeparableBlock


class PyramidHead(DenseHead):
    """LayerNorm, 1x1 to ``head_dim``; maps at half, one, two and four times the grid, added from coarse to fine; 1x1.

    The simple feature pyramid of ViTDet (Li et al. 2022): all scales come from the last block, the finer ones by 2x2
    transposed convolutions, and are added as in FPN (Lin et al. 2017), with separable blocks between. ``multilevel``
    reads several blocks instead.

    ``forward(x_BDHW, size)``: tokens on their grid ``[B, embed_dim, h, w]`` to logits ``[B, num_channels, *size]``. At
    480x640 (grid 30x40) with ``embed_dim=384``, ``head_dim=128`` and 40 classes it costs 1.00 GMACs (``light`` 0.19).
    """

    def __init__(self, embed_dim: int, num_channels: int, head_dim: int = 128) -> None:
        super().__init__()
        check_width("pyramid", head_dim)
        self.norm = ChannelNorm(embed_dim, eps=1e-6)
        self.project = nn.Conv2d(embed_dim, head_dim, 1)
        self.doublings = nn.ModuleList(nn.ConvTranspose2d(head_dim, head_dim, 2, stride=2) for _ in range(2))
        self.blocks = nn.ModuleList(SeparableBlock(head_dim) for _ in range(4))
        self.logits = nn.Conv2d(head_dim, num_channels, 1)

    def features(self, x: Tensor) -> Tensor:
        x = self.project(self.norm(x))
        half = F.avg_pool2d(x, 2, ceil_mode=True)
        twice = self.doublings[0](x)
        levels = [half, x, twice, self.doublings[1](F.gelu(twice))]
        fine = self.blocks[0](levels[0])
        for block, level in zip(list(self.blocks)[1:], levels[1:], strict=True):
            fine = block(level + resize_bilinear(fine, (level.shape[-2], level.shape[-1])))
        return fine
