"""The SETR-PUP decoder of M3ViT: four convolutions, each followed by a doubling of the resolution."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from m3bsr.heads.base import DenseHead
from m3bsr.heads.layers import ChannelNorm, resize_bilinear

WIDTH = 256
NUM_STAGES = 4


class UpsampleHead(DenseHead):
    """LayerNorm, 4 x [conv 3x3 to 256, BatchNorm, ReLU, bilinear x2], conv 1x1, resize (SETR-PUP, Zheng et al. 2021).

    ``forward(x_BDHW, size)``: tokens on their grid ``[B, embed_dim, h, w]`` to logits ``[B, num_channels, *size]``.
    ``head_dim`` is ignored: the published width is 256. At 480x640 (grid 30x40) with ``embed_dim=384`` and 40 classes
    it costs 61.3 GMACs, more than a whole ViT-S backbone (39.1): the ``light`` head is there for that reason.

    The 1x1 convolution runs before the last doubling. It commutes with the bilinear resize (the weights of one sum to
    one, the other mixes channels only), so outputs are the published ones without a full-size map of 256 channels.
    """

    def __init__(self, embed_dim: int, num_channels: int, head_dim: int = WIDTH) -> None:
        super().__init__()
        self.norm = ChannelNorm(embed_dim, eps=1e-6)
        widths = [embed_dim] + [WIDTH] * NUM_STAGES
        self.convs = nn.ModuleList(nn.Conv2d(widths[i], WIDTH, 3, padding=1) for i in range(NUM_STAGES))
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(NUM_STAGES))
        self.logits = nn.Conv2d(WIDTH, num_channels, 1)

    def features(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for stage, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.interpolate(x, scale_factor=2, mode="bilinear") if stage else x
            x = F.relu(norm(conv(x)))
        return x

    def predict(self, features_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
        return resize_bilinear(F.interpolate(self.logits(features_BCHW), scale_factor=2, mode="bilinear"), size)


def published_to_head(state_dict: Mapping[str, Tensor], task: str) -> dict[str, Tensor]:
    """The entries ``decoders.{task}.*`` of a published M3ViT checkpoint under :class:`UpsampleHead`'s names.

    ``conv_0..3 -> convs.0..3``, ``syncbn_fc_0..3 -> norms.0..3``, ``conv_4 -> logits``; a prefix before ``decoders``
    (``module.``, ``weights/``) is dropped. ValueError if there is no such decoder, naming those that there are.
    """
    pattern = re.compile(r"(?:^|[./])decoders\.([^.]+)\.(.+)$")
    found = [(m.group(1), m.group(2), value) for key, value in state_dict.items() if (m := pattern.search(key))]
    tasks = sorted({name for name, _, _ in found})
    if task not in tasks:
        raise ValueError(f"checkpoint has no decoder for task '{task}'; it has {tasks or 'none (no decoders.* keys)'}")
    renamed = {}
    for name, key, value in found:
        if name == task:
            key = key.replace(f"conv_{NUM_STAGES}.", "logits.")
            key = re.sub(r"^conv_(\d)\.", r"convs.\1.", key)
            renamed[re.sub(r"^syncbn_fc_(\d)\.", r"norms.\1.", key)] = value
    return renamed


def load_published_head(head: UpsampleHead, state_dict: Mapping[str, Tensor], task: str) -> None:
    """Load ``decoders.{task}.*`` of a published M3ViT checkpoint; ValueError if names or shapes do not fit."""
    renamed = published_to_head(state_dict, task)
    own = head.state_dict()
    if missing := sorted(set(own) ^ set(renamed)):
        raise ValueError(f"decoder of task '{task}' does not fit the upsample head: keys on one side only {missing}")
    for key, value in renamed.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"decoder of task '{task}': {key} has shape {tuple(value.shape)}, "
                f"the head expects {tuple(own[key].shape)}"
            )
    head.load_state_dict(renamed)
