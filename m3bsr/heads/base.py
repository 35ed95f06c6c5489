"""What a decoder of per-pixel outputs is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from m3bsr.heads.layers import resize_bilinear


class DenseHead(nn.Module):
    """Features, a 1x1 convolution ``logits``, one resize: ``head(x, size)`` gives ``[B, num_channels, *size]``.

    ``x`` is the tokens behind the last block on their grid ``[B, embed_dim, h, w]``; for a head with ``num_levels`` of
    more than one it is a sequence of so many such maps, from the blocks that ``head.reads`` names.
    """

    num_levels = 1
    reads: tuple[int, ...] = ()
    logits: nn.Conv2d

    @abstractmethod
    def features(self, x: Any) -> Tensor:
        """What ``logits`` reads: ``[B, logits.in_channels, h', w']``, at a resolution of the head's own."""

    def predict(self, features_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits ``[B, num_channels, *size]`` of the features."""
        return resize_bilinear(self.logits(features_BCHW), size)

    def forward(self, x: Any, size: tuple[int, int]) -> Tensor:
        return self.predict(self.features(x), size)


def check_width(head: str, head_dim: int) -> None:
    """ValueError for a head without width."""
    if head_dim < 1:
        raise ValueError(f"{head} head: head_dim must be at least 1, got {head_dim}")
