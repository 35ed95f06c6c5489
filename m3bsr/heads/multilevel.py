"""A decoder that reads several blocks: fine maps from early blocks, coarse ones from late blocks, added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from m3bsr.heads.base import DenseHead, check_width
from m3bsr.heads.layers import ChannelNorm, resize_bilinear
from m3bsr.heads.light import SeparableBlock

NUM_LEVELS = 4


def spread_levels(depth: int) -> tuple[int, ...]:
    """The blocks that the head reads by default: 2, 5, 8, 11 of twelve (as DPT for ViT-B); the last is the last block.

    ValueError for a backbone of fewer blocks than levels.
    """
    if depth < NUM_LEVELS:
        raise ValueError(f"model.head multilevel reads {NUM_LEVELS} blocks, the backbone has {depth}; use another head")
    return tuple((level + 1) * depth // NUM_LEVELS - 1 for level in range(NUM_LEVELS))


class MultiLevelHead(DenseHead):
    """Per level LayerNorm and 1x1 to ``head_dim``; maps at four, two, one and half times the grid; added; 1x1 logits.

    Where each map comes from is as in DPT (Ranftl et al. 2021): the earliest block gives the finest one. They are added
    from coarse to fine as in FPN (Lin et al. 2017), with separable blocks between: what ``pyramid`` does, which makes
    all its maps out of the last block. DPT's class-token projection and full 3x3 convolutions are left out.

    ``forward(levels, size)``: one map ``[B, embed_dim, h, w]`` for each of ``blocks``, in that order, to logits
    ``[B, num_channels, *size]``. At 480x640 (grid 30x40) with ``embed_dim=384``, ``head_dim=128`` and 40 classes it
    costs 1.25 GMACs (``light`` 0.19, ``pyramid`` 1.00).

    Args:
        blocks: the four blocks whose outputs it reads, ascending.
    """

    num_levels = NUM_LEVELS

    def __init__(
        self, embed_dim: int, num_channels: int, head_dim: int = 128, blocks: Sequence[int] = (2, 5, 8, 11)
    ) -> None:
        super().__init__()
        check_width("multilevel", head_dim)
        blocks = tuple(blocks)
        if len(blocks) != NUM_LEVELS or sorted(set(blocks)) != list(blocks):
            raise ValueError(f"model.head_blocks must name {NUM_LEVELS} blocks for multilevel, ascending, got {blocks}")
        self.reads = blocks
        self.norms = nn.ModuleList(ChannelNorm(embed_dim, eps=1e-6) for _ in blocks)
        self.projects = nn.ModuleList(nn.Conv2d(embed_dim, head_dim, 1) for _ in blocks)
        self.twice = nn.ConvTranspose2d(head_dim, head_dim, 2, stride=2)
        self.four_times = nn.Sequential(
            nn.ConvTranspose2d(head_dim, head_dim, 2, stride=2),
            nn.GELU(),
            nn.ConvTranspose2d(head_dim, head_dim, 2, stride=2),
        )
        self.fuse = nn.ModuleList(SeparableBlock(head_dim) for _ in blocks)
        self.logits = nn.Conv2d(head_dim, num_channels, 1)

    def features(self, x: Sequence[Tensor]) -> Tensor:
        maps = [project(norm(level)) for project, norm, level in zip(self.projects, self.norms, x, strict=True)]
        levels = [F.avg_pool2d(maps[3], 2, ceil_mode=True), maps[2], self.twice(maps[1]), self.four_times(maps[0])]
        fine = self.fuse[0](levels[0])
        for fuse, level in zip(list(self.fuse)[1:], levels[1:], strict=True):
            fine = fuse(level + resize_bilinear(fine, (level.shape[-2], level.shape[-1])))
        return fine
