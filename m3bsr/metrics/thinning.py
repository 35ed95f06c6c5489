"""Morphological thinning of many nested binary maps at once.

The edge benchmark thins a probability map at 99 thresholds. The maps are packed as bits of 64-bit words, 64 thresholds
a word, and the thinning rule, a boolean function of the eight neighbours, is evaluated with bitwise operations on all
of them together: on the whole picture as long as much of it changes, and then only where the neighbourhood changed.

Shapes: H, W image; T thresholds; A active pixels; N pixels of a grid with a border of one, flattened.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

WORD = 64
CHUNK = 8192
"""Words handled together: enough to spread NumPy's overhead, few enough for the temporaries to stay in the cache."""
FEW = 0.06
"""Below this share of words that change, listing them costs less than looking at all."""


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
    # Neighbours counter-clockwise from the east: x1..x8 of the papers. The second half-step is the first one on the
    # picture turned by 180 degrees.
    around = np.array([1, 1 - stride, -stride, -stride - 1, -1, stride - 1, stride, stride + 1])
    halves = [around, np.roll(around, 4)]
    before, last = _thin_everywhere(flat, halves, int(FEW * words.size))
    _thin_listed(flat, halves, before, last)
    return grid[1:-1, 1:-1].copy()


def _thin_everywhere(flat: np.ndarray, halves: list[np.ndarray], few: int) -> tuple[np.ndarray, np.ndarray]:
    """Half-steps on all words until few change; returns what was deleted in the last two, ``[N]`` each.

    ``halves`` are swapped with each half-step: the next comes first.
    """
    edge = int(halves[0].max())
    # Before the first half-step everything counts as touched, for neither half has looked at anything.
    removed = [np.zeros_like(flat), flat.copy()]
    num_changed = np.count_nonzero(flat) // 2
    while num_changed > few:
        gone = removed.pop(0)
        for start in range(edge, len(flat) - edge, CHUNK):
            stop = min(start + CHUNK, len(flat) - edge)
            near = [flat[start + offset : stop + offset] for offset in halves[0].tolist()]
            gone[start:stop] = _removable(flat[start:stop], near)
        flat ^= gone
        num_changed = np.count_nonzero(gone)
        removed.append(gone)
        halves.reverse()
    return removed[0], removed[1]


def _thin_listed(flat: np.ndarray, halves: list[np.ndarray], before: np.ndarray, last: np.ndarray) -> None:
    """Half-steps on what the last two of them touched, which deleted the bits ``before`` and ``last`` (``[N]``)."""
    around = halves[0][:, None]
    stamps = np.zeros(len(flat), dtype=np.int32)
    older, newer = (
        _touched(flat, _changes(before), around, stamps, 1),
        _touched(flat, _changes(last), around, stamps, 2),
    )
    for step in itertools.count(3):
        # Since its last turn this half has not seen what either of the two half-steps touched; each place once.
        active = np.concatenate([newer, older[stamps[older] != step - 1]])
        if not len(active):
            return
        changes = []
        for where in _parts(active):
            gone = _removable(flat.take(where), flat.take(where + halves[0][:, None]))
            hit = np.flatnonzero(gone != 0)
            changes.append((where[hit], gone[hit]))
        # All deletions of a half-step are decided before the first is made.
        for where, gone in changes:
            flat[where] ^= gone
        older, newer = newer, _touched(flat, changes, around, stamps, step)
        halves.reverse()


def _changes(gone: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Places of the words that are not empty, and these words."""
    return [(where, gone[where]) for where in _parts(np.flatnonzero(gone != 0))]


def _parts(places: np.ndarray) -> list[np.ndarray]:
    return [places[i : i + CHUNK] for i in range(0, len(places), CHUNK)]


def _touched(
    flat: np.ndarray, changes: list[tuple[np.ndarray, np.ndarray]], around: np.ndarray, stamps: np.ndarray, step: int
) -> np.ndarray:
    """Neighbours of deleted bits that are still set in the same plane, each once; ``stamps`` there become ``step``."""
    near = [np.empty(0, dtype=np.int64)]
    for where, gone in changes:
        places = where + around
        still = flat.take(places)
        still &= gone
        near.append(places.ravel().take(np.flatnonzero(still != 0)))
    places = np.concatenate(near)
    number = np.arange(-len(places), 0, dtype=np.int32)
    stamps[places] = number  # of several mentions of a place one stays
    places = places[stamps[places] == number]
    stamps[places] = step
    return places


def _removable(x: np.ndarray, around: Sequence[np.ndarray]) -> np.ndarray:
    """Bits of ``x`` that the first half-step deletes, given the neighbours x1..x8.

    Conditions G1 (one of the crossings ``~x1 & (x2 | x3)``, ``~x3 & (x4 | x5)``, ... around the pixel), G2 (two or
    three of the pairs x1x2, x3x4, x5x6, x7x8 are not empty, or of x2x3, ...: the smaller number counts) and G3
    (``~((x2 | x3 | ~x8) & x1)``) of Lam, Lee and Suen, worked out by the values of x1 and x5: that takes 34 operations
    instead of 56.
    """
    x1, x2, x3, x4, x5, x6, x7, x8 = around
    x23, x78, both_78 = x2 | x3, x7 | x8, x7 & x8
    # x1 = x5 = 0: three in a row above or below, and nothing opposite.
    free = x2 & x3
    free &= x4
    free |= both_78 & x6
    free &= ~((x23 | x4) & (x78 | x6))
    # x1 = 0, x5 = 1.
    joined = x4 & x6
    joined |= x3
    joined |= x7
    x78 ^= x7  # x8 without x7
    x78 |= x23 ^ x3  # or x2 without x3
    x78 |= x2 & x8
    joined &= ~x78
    joined ^= free
    joined &= x5
    joined ^= free
    # x1 = 1.
    corner = ~x4
    corner |= x5
    corner &= both_78
    corner &= ~x23
    corner ^= joined
    corner &= x1
    corner ^= joined
    corner &= x
    return corner
