"""Norms of the blocks and the heads: scales and shifts only."""

from __future__ import annotations

from timm.layers import RmsNorm, SimpleNorm
from torch import nn

from m3bsr.methods.base import FROZEN, Method
from m3bsr.models import MultiTaskModel

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, RmsNorm, SimpleNorm)


def _change(model: MultiTaskModel, value: str) -> None:
    for module in model.backbone.blocks.modules():
        if isinstance(module, NORMS):
            module.requires_grad_(True)


NORM = Method("norms of the blocks and the heads", lambda plan, depth, value: FROZEN, _change, lr_scale=10.0)
