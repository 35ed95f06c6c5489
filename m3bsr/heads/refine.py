"""Cross-task refinement: while a model trains, the features of each task's head look at those of the others.

After the idea of M3ViT's TAM (Liang et al., NeurIPS 2022), which is written out for two to five tasks; the design here
is our own and takes any number. At every place of the map each task asks all tasks, itself among them, what they have
there (attention over tasks, not over places: ``T x T`` scores a place), and adds the answer to its own features.
From these come auxiliary predictions, which are scored by the same loss. Their gradients reach the heads and the
backbone of every task that was asked, so features of one task learn what helps another. Nothing of it is needed, or
run, for a prediction.

Shapes: B images, T tasks, C channels, h x w places.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from m3bsr.heads.base import DenseHead
from m3bsr.heads.layers import resize_bilinear
from m3bsr.heads.light import SeparableBlock


def attend_tasks(query_TBChw: Tensor, key_TBChw: Tensor, value_TBChw: Tensor) -> Tensor:
    """At each place of each image: ``sum_u softmax_u(<q_t, k_u> / sqrt(C)) v_u`` for every task t, over all tasks u."""
    scores = torch.einsum("tbchw,ubchw->tubhw", query_TBChw, key_TBChw) * query_TBChw.shape[2] ** -0.5
    return torch.einsum("tubhw,ubchw->tbchw", scores.softmax(dim=1), value_TBChw)


class CrossTaskRefinement(nn.Module):
    """Auxiliary predictions of every dense task from the features of all of them; for training only.

    Per task: 1x1 to ``dim``, a separable 3x3 block, attention over tasks, 1x1 back in, logits. Maps of different sizes
    meet at that of the smallest.

    Args:
        heads: the heads whose features meet, at least two.
        dim: width in which they do.
        weight: of the auxiliary losses beside those of the tasks (``ModelOutput.auxiliary_weight``).

    Raises:
        ValueError: fewer than two heads.
    """

    def __init__(self, heads: Mapping[str, DenseHead], dim: int, weight: float = 1.0) -> None:
        super().__init__()
        if len(heads) < 2:
            raise ValueError(f"model.refine_dim needs two dense tasks or more, got {', '.join(heads) or 'none'}")
        self.weight = weight
        widths = {task: head.logits.in_channels for task, head in heads.items()}
        self.enter = nn.ModuleDict(
            {task: nn.Sequential(nn.Conv2d(width, dim, 1), SeparableBlock(dim)) for task, width in widths.items()}
        )
        self.ask = nn.ModuleDict({task: nn.Conv2d(dim, dim, 1) for task in heads})
        self.tell = nn.ModuleDict({task: nn.Conv2d(dim, 2 * dim, 1) for task in heads})
        self.answer = nn.ModuleDict({task: nn.Conv2d(dim, dim, 1) for task in heads})
        self.logits = nn.ModuleDict({task: nn.Conv2d(dim, head.logits.out_channels, 1) for task, head in heads.items()})
        for task, head in heads.items():  # they start where the head does (metres, not zero)
            bias = head.logits.bias
            assert bias is not None
            self.logits[task].get_parameter("bias").data.copy_(bias.data)

    def forward(self, features: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """Auxiliary logits ``[B, channels of the task, *size]`` from ``DenseHead.features`` of two tasks or more."""
        smallest = min(((x.shape[-2], x.shape[-1]) for x in features.values()), key=lambda hw: hw[0] * hw[1])
        own = {task: self.enter[task](resize_bilinear(x, smallest)) for task, x in features.items()}
        query = torch.stack([self.ask[task](x) for task, x in own.items()])
        key, value = torch.stack([self.tell[task](x) for task, x in own.items()]).chunk(2, dim=2)
        answers = attend_tasks(query, key, value)
        refined = {task: x + self.answer[task](told) for (task, x), told in zip(own.items(), answers, strict=True)}
        return {task: resize_bilinear(self.logits[task](x), size) for task, x in refined.items()}
