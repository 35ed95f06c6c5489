"""What a gate decides: which experts serve a token, and with what weight.

Shapes: T tokens, K experts chosen per token, E experts, G groups of tokens (tasks).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GateOutput(NamedTuple):
    """The choice of one gate for one group of tokens; expert ids are global (a window's offset is already in them)."""

    weights_TK: Tensor
    experts_TK: Tensor
    balance_loss: Tensor
    z_loss: Tensor


class Routing(NamedTuple):
    """The routing of one MoE layer in one forward pass. A tuple, so that DDP and checkpointing see its tensors.

    Tokens are task-major: all tokens of `tasks[0]` come first, and every task has the same number of them.
    `balance_loss` and `z_loss` are scalars with gradients; several gates (or one gate with a window per task) are
    averaged, so the weight of the loss means the same for one task as for five.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    num_experts: int
    tasks: tuple[str, ...]

    def counts(self) -> Tensor:
        """How often each task chose each expert: int64 `[len(tasks), E]`."""
        return count_experts(self.experts_TK.reshape(len(self.tasks), -1), self.num_experts)


def count_experts(experts_GN: Tensor, num_experts: int) -> Tensor:
    """Count expert ids per row: `[G, N] -> [G, E]` int64 (integer sums, so the same on every run)."""
    counts_GE = torch.zeros(experts_GN.shape[0], num_experts, dtype=torch.int64, device=experts_GN.device)
    return counts_GE.scatter_add_(1, experts_GN, torch.ones_like(experts_GN))


def select_top_k(scores_TE: Tensor, num: int) -> Tensor:
    """Ids of the `num` best scores of each row, best first, ties to the lower id: `[T, num]` int64.

    `torch.topk` breaks ties as it likes; upcycled gates with tied columns need one answer everywhere.
    """
    return torch.sort(scores_TE.detach(), dim=-1, descending=True, stable=True).indices[:, :num]


def most_used(counts: Tensor, num: int) -> tuple[int, ...]:
    """The `num` experts with the highest counts (`[E]`, or `[G, E]` summed over tasks), ties to the lower id; sorted.

    For `train_experts="top:n"`: sum `Routing.counts()` over a few batches of the new task first.

    Raises:
        ValueError: for fewer than 1 or more than E experts.
    """
    counts_E = counts.reshape(-1, counts.shape[-1]).sum(0)
    if not 1 <= num <= counts_E.numel():
        raise ValueError(f"top:n must choose 1..{counts_E.numel()} experts, got {num}")
    return tuple(sorted(select_top_k(counts_E[None], num)[0].tolist()))
