"""``bsr.train_experts="top:n"``: the experts that the new data uses most, counted on a few batches before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from m3bsr.models import MultiTaskModel
from m3bsr.moe.routing import most_used


def choose_experts(
    model: MultiTaskModel, images: Iterable[Tensor], blocks: Sequence[int], num: int
) -> tuple[tuple[int, ...], ...]:
    """The ``num`` most used experts of each MoE block among ``blocks``, in the order of the blocks.

    Args:
        model: with the weights that training starts from; evaluated without gradients, its mode is put back.
        images: batches ``[B, 3, H, W]``, normalised.
        blocks: the blocks that will train.

    Raises:
        ValueError: none of the blocks has experts, or ``num`` is more than there are.
    """
    chosen = [block for block in blocks if block in model.backbone.moe_blocks]
    if not chosen:
        raise ValueError(f"bsr.train_experts: none of the trained blocks {tuple(blocks)} has experts")
    counts: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in images:
                for block, routing in model(batch).routing.items():
                    counts[block] = counts.get(block, 0) + routing.counts().sum(0)
    finally:
        model.train(was_training)
    return tuple(most_used(counts[block], num) for block in chosen)
