"""Bottleneck adapters behind the MLP of every block (Houlsby et al., ICML 2019).

``y + up(gelu(down(y)))`` on what the MLP (or the experts) of a block gives, before it is added to the tokens; ``up``
is zero at the start. Width of the bottleneck: a twelfth of the tokens' (64 for ViT-B), or ``adapter:WIDTH``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from m3bsr.methods.base import FROZEN, Method, positive, short_names
from m3bsr.models import MultiTaskModel


class Adapter(nn.Module):
    """``scale(y) + up(gelu(down(scale(y))))``; takes the place of ``scale``, the LayerScale behind an MLP, if any."""

    def __init__(self, scale: nn.Module, dim: int, width: int) -> None:
        super().__init__()
        self.scale = scale
        down, up = nn.Linear(dim, width), nn.Linear(width, dim)
        nn.init.trunc_normal_(down.weight, std=0.02)
        for start_at_zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(start_at_zero)
        self.adapter = nn.ModuleDict({"down": down, "up": up})

    def forward(self, y_BND: Tensor) -> Tensor:
        y_BND = self.scale(y_BND)
        return y_BND + self.adapter["up"](F.gelu(self.adapter["down"](y_BND)))


def _change(model: MultiTaskModel, value: str) -> None:
    dim = model.backbone.embed_dim
    like = next(model.backbone.parameters())
    blocks: Any = model.backbone.blocks
    for index, block in enumerate(blocks):
        if not isinstance(getattr(block, "ls2", None), nn.Module):
            raise ValueError(f"model.method adapter: block {index} is a {type(block).__name__}, it needs timm's Block")
        block.ls2 = Adapter(block.ls2, dim, positive(value, max(1, dim // 12))).to(like.device, like.dtype)
        short_names(block.ls2, lambda name: name.removeprefix("scale."))


ADAPTER = Method(
    "bottleneck adapters behind every MLP, and the heads",
    lambda plan, depth, value: FROZEN,
    _change,
    value="the width of the bottleneck",
    check_value=lambda value: positive(value, 1),
    lr_scale=5.0,
)
