"""Tokens that cover the image: the grid is cut into square cells, and every cell keeps some.

Attention scores gather on a few objects; a dense task is asked about every pixel, also about those of the wall behind.
A cell has at least 2x2 patches, more where fewer tokens are kept than there are cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3bsr.bsr.selectors.base import Candidates


def cover(tokens: Candidates) -> Tensor:
    """The best of every cell first, then whatever has the highest score."""
    order_BM = place(tokens.scores_BM)
    return order_BM.shape[1] * (place_in_cell(tokens, order_BM) == 0).to(order_BM.dtype) - order_BM


def spread(tokens: Candidates) -> Tensor:
    """The best of every cell, then the second of every cell, and so on: every cell keeps as many, give or take one."""
    order_BM = place(tokens.scores_BM)
    return -(place_in_cell(tokens, order_BM) * order_BM.shape[1] + order_BM)


def random(tokens: Candidates) -> Tensor:
    """As ``spread``, with scores drawn anew at every step of training: each token has its turn."""
    if not tokens.training:
        return spread(tokens)
    return spread(tokens._replace(scores_BM=torch.rand_like(tokens.scores_BM, dtype=torch.float32)))


def place(scores_BM: Tensor) -> Tensor:
    """Place of every token in the order of falling scores, from 0; of equal scores the first comes first."""
    return scores_BM.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def cell_side(grid: tuple[int, int], num_keep: int) -> int:
    """Side in patches of the smallest cells, 2x2 or larger, of which there are at most ``num_keep``."""
    side = 2
    while side < max(grid) and -(-grid[0] // side) * -(-grid[1] // side) > num_keep:
        side += 1
    return side


def place_in_cell(tokens: Candidates, order_BM: Tensor) -> Tensor:
    """How many tokens of its cell come before each token in ``order_BM``; fused tokens share a cell, the last."""
    side, (h, w) = cell_side(tokens.grid, tokens.num_keep), tokens.grid
    across = -(-w // side)
    cell_BM = tokens.patch_BM // w // side * across + tokens.patch_BM % w // side
    num_cells = -(-h // side) * across + 1
    cell_BM = torch.where(tokens.patch_BM < 0, num_cells - 1, cell_BM)
    by_cell_BM = (cell_BM * order_BM.shape[1] + order_BM).argsort(dim=1)
    position_BM = by_cell_BM.argsort(dim=1)
    counts_BC = torch.zeros(len(cell_BM), num_cells, dtype=torch.int64, device=cell_BM.device)
    counts_BC.scatter_add_(1, cell_BM, torch.ones_like(cell_BM))
    return position_BM - (counts_BC.cumsum(1) - counts_BC).gather(1, cell_BM)
