"""Decoders from patch tokens on a grid to per-pixel outputs, by name.

``HEADS[name](embed_dim, num_channels, head_dim=128)``; ``head(x_BDHW, size)`` gives ``[B, num_channels, *size]``. A
head of several levels (``num_levels``) also takes ``blocks=``, and reads one map of each of them instead of ``x_BDHW``.
A new head is one file and one line in ``HEADS``. ``ClassifierHead`` is for one class per image.
"""

from __future__ import annotations

from torch import nn

from m3bsr.heads.aspp import ASPPHead
from m3bsr.heads.base import DenseHead
from m3bsr.heads.classifier import ClassifierHead
from m3bsr.heads.light import LightHead
from m3bsr.heads.multilevel import MultiLevelHead, spread_levels
from m3bsr.heads.pyramid import PyramidHead
from m3bsr.heads.refine import CrossTaskRefinement
from m3bsr.heads.upsample import UpsampleHead, load_published_head

HEADS: dict[str, type[DenseHead]] = {
    "upsample": UpsampleHead,
    "light": LightHead,
    "aspp": ASPPHead,
    "pyramid": PyramidHead,
    "multilevel": MultiLevelHead,
}


def set_output_bias(head: nn.Module, value: float) -> None:
    """Start a fresh head's outputs near ``value`` (``Task.output_bias``): metres from 0 to 2.7 take long to learn."""
    nn.init.constant_(head.get_submodule("logits").get_parameter("bias"), value)


__all__ = [
    "HEADS",
    "ASPPHead",
    "ClassifierHead",
    "CrossTaskRefinement",
    "DenseHead",
    "LightHead",
    "MultiLevelHead",
    "PyramidHead",
    "UpsampleHead",
    "load_published_head",
    "set_output_bias",
    "spread_levels",
]
