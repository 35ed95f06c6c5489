"""What a selector is given and what it is.

Shapes: B images, M tokens that may be dropped, d width of their keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Candidates(NamedTuple):
    """The tokens that a drop chooses from."""

    scores_BM: Tensor
    """Attention scores, detached."""
    patch_BM: Tensor
    """Patch index in the image; -1 for a fused token."""
    num_keep: int
    """Tokens that will be kept."""
    grid: tuple[int, int]
    """Patches per column and row."""
    keys_BMd: Tensor | None = None
    """Keys averaged over heads; given to selectors that need them."""
    training: bool = False
    """Whether choices may be random."""


class Selector(NamedTuple):
    """A way to rank tokens, see ``SELECTORS``."""

    rank: Callable[[Candidates], Tensor]
    needs_keys: bool = False
    is_random: bool = False
    """In training it chooses others for the same tokens each time."""
