"""Mixup and CutMix of whole batches, by torchvision.

Not by timm, from which RandAugment is: its ``Mixup`` pairs image i with image B - 1 - i, so that a batch must be even,
and its targets know no image without a class. Either way numbers come from generators that the loader seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
import torchvision.transforms.v2 as v2

from m3bsr.utils.constants import NO_CLASS

Batch = dict[str, Any]


class MixImages:
    """Blend the images of a batch in pairs, and their classes in the same proportion: targets become ``[B, C]``.

    Mixup (Zhang et al., ICLR 2018) adds two pictures up, CutMix (Yun et al., ICCV 2019) pastes a part of one into the
    other; with both, one of them is drawn for each batch. An image without a class (``NO_CLASS``) has a share of none.

    Args:
        num_classes: per classification task; a batch may hold the labels of one of them only.
        mixup, cutmix: parameter of the Beta distribution of the share, 0 for never.
    """

    def __init__(self, num_classes: Mapping[str, int], mixup: float, cutmix: float) -> None:
        self.num_classes = dict(num_classes)
        self.mixes = {task: _mix(number, mixup, cutmix) for task, number in num_classes.items()}

    def __call__(self, batch: Batch) -> Batch:
        for task, mix in self.mixes.items():
            if task in batch:
                known = batch[task] != NO_CLASS
                shares = F.one_hot(batch[task] * known, self.num_classes[task]).float() * known[:, None]
                images, labels = mix(batch["image"], shares)
                return {**batch, "image": images, task: labels}
        return batch


def _mix(num_classes: int, mixup: float, cutmix: float) -> Callable[..., Any]:
    mixes: list[Callable[..., Any]] = []
    if mixup > 0:
        mixes.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix > 0:
        mixes.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    return v2.RandomChoice(mixes)
