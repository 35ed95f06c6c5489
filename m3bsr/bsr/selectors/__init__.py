"""Which tokens a drop keeps: one file and one line here each.

A selector ranks tokens: ``SELECTORS[name].rank(candidates)`` gives a number per token ``[B, M]``, and a drop keeps
those with the highest (of equal ones the first). It must not need gradients, and must depend on nothing but its
argument and, in training, the random state.
"""

from __future__ import annotations

from m3bsr.bsr.selectors.base import Candidates, Selector
from m3bsr.bsr.selectors.cells import cover, random, spread
from m3bsr.bsr.selectors.score import by_score
from m3bsr.bsr.selectors.similar import similar

SELECTORS: dict[str, Selector] = {
    "score": Selector(by_score),
    "cover": Selector(cover),
    "spread": Selector(spread),
    "random": Selector(random, is_random=True),
    "similar": Selector(similar, needs_keys=True),
}

__all__ = ["SELECTORS", "Candidates", "Selector"]
