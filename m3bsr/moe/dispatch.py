"""From the experts of each token to the tokens of each expert: one stable sort.

Shapes: T tokens, K choices, E experts, R rows of the sorted buffer (T * K, plus padding).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """Where every (token, choice) lies in a buffer that is sorted by expert.

    tokens_R: the token of each row (0 in padding rows); row_TK: the row of each choice; spans: rows `(first, end)` of
    each expert, padding included; counts: rows that hold a choice, per expert. `weights_TK` of padding is zero, so it
    neither adds to an output nor to a gradient.
    """

    tokens_R: Tensor
    row_TK: Tensor
    spans: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.tokens_R.shape[0]

    def row_weights(self, weights_TK: Tensor) -> Tensor:
        """The weight of each row, zero in padding: `[R]`."""
        weights_R = weights_TK.new_zeros(self.num_rows)
        return weights_R.index_put_((self.row_TK.reshape(-1),), weights_TK.reshape(-1))


def plan_dispatch(experts_TK: Tensor, num_experts: int, *, pad_rows: int = 1) -> Dispatch:
    """Sort the choices `[T, K]` by expert. Costs one host synchronisation on CUDA (the counts).

    `pad_rows` rounds each expert's share up to a multiple: oneDNN compiles a bf16 kernel per shape, and fresh routing
    brings fresh shapes in every step.
    """
    flat_N = experts_TK.reshape(-1)
    sorted_N, order_N = torch.sort(flat_N, stable=True)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_N.device)
    counts_E.scatter_add_(0, flat_N, torch.ones_like(flat_N))
    counts = tuple(counts_E.tolist())
    spans, first = [], 0
    for count in counts:
        end = first + -(-count // pad_rows) * pad_rows
        spans.append((first, end))
        first = end
    tokens_N = order_N // max(experts_TK.shape[1], 1)
    rows_N = torch.arange(flat_N.numel(), device=flat_N.device)
    tokens_R = tokens_N
    if pad_rows > 1:
        shift_E = torch.tensor([s for s, _ in spans], device=flat_N.device) - (counts_E.cumsum(0) - counts_E)
        rows_N = rows_N + shift_E[sorted_N]
        tokens_R = torch.zeros(first, dtype=torch.int64, device=flat_N.device)
        tokens_R[rows_N] = tokens_N
    row_TK = torch.empty_like(flat_N)
    row_TK[order_N] = rows_N
    return Dispatch(tokens_R, row_TK.view_as(experts_TK), tuple(spans), counts)
