"""The Berkeley benchmark's own matcher, to check ours against: its C++ code in the package pyEdgeEval (extra ``bsds``).

The benchmark gives each pixel a few places of its own at random and rounds distances to hundredths, so its counts
differ by a few pixels from run to run; :func:`m3bsr.metrics.edges.edge_counts` solves the same assignment exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from skimage.morphology import thin

from m3bsr.metrics.edges import EdgeCounts


def _correspond() -> Callable[..., tuple[np.ndarray, ...]]:
    try:
        from pyEdgeEval._lib import correspond_pixels
    except ImportError as error:
        raise ValueError(
            f"the benchmark's own matcher needs pyEdgeEval, which compiles C++ ({error}): pip install 'm3bsr[bsds]'"
        ) from None
    return correspond_pixels


def bsds_counts(
    probability: np.ndarray,
    annotations: np.ndarray,
    thresholds: np.ndarray,
    max_dist: float,
    thin_target: bool = False,
) -> EdgeCounts:
    """As :func:`m3bsr.metrics.edges.edge_counts`, thinned by scikit-image and matched by the benchmark's code.

    Raises:
        ValueError: pyEdgeEval is not installed.
    """
    correspond = _correspond()
    annotations = np.stack([thin(a) if thin_target else a for a in annotations])
    counts = EdgeCounts(*np.zeros((4, len(thresholds)), dtype=np.int64))
    counts.annotated[:] = annotations.sum()
    drawn = [a for a in annotations if a.any()]
    for k, threshold in enumerate(thresholds):
        predicted = thin(probability >= threshold)
        hit = np.zeros_like(predicted)
        if predicted.any():
            for annotation in drawn:
                matched, found, *_ = correspond(predicted, annotation, max_dist)
                hit |= matched > 0
                counts.hit_annotated[k] += np.count_nonzero(found)
        counts.hit_predicted[k], counts.predicted[k] = np.count_nonzero(hit), np.count_nonzero(predicted)
    return counts
