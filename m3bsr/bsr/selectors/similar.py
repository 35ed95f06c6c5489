"""Tokens that have a near-double elsewhere go first, whatever their score.

Source of the idea: token merging, arXiv 2210.09461 (bipartite soft matching): tokens are parted into two halves, and
only those of one half may go, each into its most similar one of the other. Here the halves are the colours of a chess
board, so that every patch has its neighbours in the other half.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from m3bsr.bsr.selectors.base import Candidates


def similar(tokens: Candidates) -> Tensor:
    """White tokens by how unlike the black ones they are; black ones (and fused ones) stay as long as white ones do."""
    assert tokens.keys_BMd is not None, "this selector needs keys"
    keys_BMd = F.normalize(tokens.keys_BMd.float(), dim=-1)
    width = tokens.grid[1]
    black_BM = (tokens.patch_BM < 0) | ((tokens.patch_BM // width + tokens.patch_BM % width) % 2 == 0)
    same_BMM = black_BM.unsqueeze(2) == black_BM.unsqueeze(1)
    alike_BM = (keys_BMd @ keys_BMd.transpose(1, 2)).masked_fill(same_BMM, -1.0).amax(dim=2)
    return 4.0 * black_BM - alike_BM
