"""Morphological thinning of many nested binary maps at once.

The edge benchmark thins a probability map at 99 thresholds. The maps are packed as bits of 64-bit words, 64 thresholds
a word, and the thinning rule, a boolean function of the eight neighbours, is evaluated with bitwise operations on all
of them together; after the first pass only pixels whose neighbourhood changed are looked at again.

Shapes: H, W image; T thresholds; A active pixels. Words live on a grid with a border of one, flattened.
"""

from __future__ import annotations

import numpy as np

WORD = 64
CHUNK = 8192


def pack_thresholds(probability: np.ndarray, thresholds: np.ndarray) -> list[np.ndarray]:
    """``[H, W]`` to words ``[H, W]`` uint64, one for each 64 thresholds: bit k is ``probability >= thresholds[k]``.

    ``thresholds`` must increase. NaN is below every threshold.
    """
    # The number of thresholds at or below the value says which bits are set: the lowest ones.
    level = np.searchsorted(thresholds, np.nan_to_num(probability, nan=-np.inf), side="right")
    words = []
    for start in range(0, len(thresholds), WORD):
        num_bits = np.clip(level - start, 0, WORD)
        low_bits = np.array([(1 << n) - 1 for n in range(WORD + 1)], dtype=np.uint64)
        words.append(low_bits[num_bits])
    return words


def thin_words(words: np.ndarray) -> np.ndarray:
    """Thin each of the 64 bit planes of ``words [H, W]`` (uint64) until nothing changes.

    Two-subiteration parallel thinning (Guo and Hall 1989, algorithm A1; Lam, Lee and Suen 1992), which MATLAB's
    ``bwmorph(..., "thin", Inf)`` and scikit-image's ``thin`` use too: lines one pixel wide, connectivity kept.
    """
    height, width = words.shape
    stride = width + 2
    grid = np.zeros((height + 2, stride), dtype=np.uint64)
    grid[1:-1, 1:-1] = words
    flat = grid.reshape(-1)
    # Neighbours counter-clockwise from the east: x1..x8 of the papers.
    offsets = np.array([1, 1 - stride, -stride, -stride - 1, -1, stride - 1, stride, stride + 1])
    # A pixel is looked at in a half-step if its neighbourhood changed since that half-step last looked.
    todo = [flat != 0, flat != 0]
    half, idle = 0, 0
    while idle < 2:
        active = np.flatnonzero(todo[half])
        todo[half][active] = False
        active = active[flat[active] != 0]
        # All deletions of a half-step are decided before the first is made; chunks keep the temporaries in cache.
        chunks = [active[i : i + CHUNK] for i in range(0, len(active), CHUNK)]
        removed = [_removable(flat, chunk, offsets, second=bool(half)) for chunk in chunks]
        idle += 1
        for chunk, bits in zip(chunks, removed, strict=True):
            hit = bits != 0
            changed = chunk[hit]
            if len(changed):
                idle = 0
                flat[changed] &= ~bits[hit]
                touched = (changed[:, None] + offsets).reshape(-1)
                todo[0][touched] = True
                todo[1][touched] = True
        half ^= 1
    return grid[1:-1, 1:-1].copy()


def _removable(flat: np.ndarray, active: np.ndarray, offsets: np.ndarray, second: bool) -> np.ndarray:
    """Bits that this half-step deletes at the ``active`` positions (conditions G1, G2, G3 of Lam, Lee and Suen)."""
    x1, x2, x3, x4, x5, x6, x7, x8 = (flat[active + offset] for offset in offsets)
    # G1: exactly one of four 0-to-1 crossings around the pixel.
    b1, b2, b3, b4 = ~x1 & (x2 | x3), ~x3 & (x4 | x5), ~x5 & (x6 | x7), ~x7 & (x8 | x1)
    one = (b1 ^ b2 ^ b3 ^ b4) & ~((b1 & b2) | (b3 & b4))
    # G2: the smaller of the two neighbour counts is 2 or 3, that is, both at least 2 and not both 4.
    two_a, four_a = _at_least_two_and_all(x1 | x2, x3 | x4, x5 | x6, x7 | x8)
    two_b, four_b = _at_least_two_and_all(x2 | x3, x4 | x5, x6 | x7, x8 | x1)
    # G3: which side is peeled in this half-step.
    blocked = (x6 | x7 | ~x4) & x5 if second else (x2 | x3 | ~x8) & x1
    return flat[active] & one & two_a & two_b & ~(four_a & four_b) & ~blocked


def _at_least_two_and_all(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ab, cd = a & b, c & d
    return ab | cd | ((a | b) & (c | d)), ab & cd
