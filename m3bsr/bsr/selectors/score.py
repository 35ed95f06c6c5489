"""The tokens with the highest attention scores."""

from __future__ import annotations

from torch import Tensor

from m3bsr.bsr.selectors.base import Candidates


def by_score(tokens: Candidates) -> Tensor:
    """The scores themselves."""
    return tokens.scores_BM
