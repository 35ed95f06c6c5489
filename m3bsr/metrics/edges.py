"""Boundary scores as in the Berkeley benchmark: odsF, oisF and AP, without MATLAB.

For each of 99 thresholds the probability map is binarised, thinned to lines one pixel wide, and matched one to one
with every annotation within ``max_dist`` of the image diagonal. Per threshold four integers are summed over images:
matched and predicted pixels (precision), matched and annotated pixels (recall). Everything else follows from these.

``tools/score_edges.py --bench`` prints the speed on one core at 321x481 with 99 thresholds. With one annotation half of
it is thinning, and the number of matched pixels, all that is needed, comes from maximum matchings of all thresholds at
once. Of several annotations it matters which pixels each of them matches, which takes a minimum-cost assignment for
each at every threshold: that sets the limit there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m3bsr.metrics.base import SumMetric, count
from m3bsr.metrics.matching import disc_offsets, max_matching_sizes, min_cost_matching
from m3bsr.metrics.thinning import WORD, pack_thresholds, thin_words
from m3bsr.utils.constants import IGNORE

BATCH = 16
"""Thresholds matched together: enough to spread NumPy's overhead, few enough for tens of megabytes at 480x640."""

COUNTS = ("hit_predicted", "predicted", "hit_annotated", "annotated")


class EdgeCounts(NamedTuple):
    """Pixel counts per threshold, ``[T]`` int64 each."""

    hit_predicted: np.ndarray
    predicted: np.ndarray
    hit_annotated: np.ndarray
    annotated: np.ndarray


class _Candidates(NamedTuple):
    """All pairs (annotated pixel, pixel predicted at some threshold) within the distance, rows sorted."""

    rows: np.ndarray
    columns: np.ndarray
    distances: np.ndarray
    words: list[np.ndarray]
    num_rows: int
    pixels: np.ndarray  # flat image index of each column


def edge_counts(
    probability: np.ndarray,
    annotations: np.ndarray,
    thresholds: np.ndarray,
    max_dist: float,
    thin_target: bool = False,
) -> EdgeCounts:
    """Counts of one image.

    ``probability [H, W]`` (NaN where invalid), ``annotations [A, H, W]`` bool, ``thresholds [T]`` increasing,
    ``max_dist`` as a fraction of the diagonal. A predicted pixel counts as hit if any annotation matches it.
    """
    radius = max_dist * math.hypot(*probability.shape)
    planes = [thin_words(words) for words in pack_thresholds(probability, thresholds)]
    if thin_target:
        annotations = np.stack([thin_words(a.astype(np.uint64)) != 0 for a in annotations])
    candidates = [_candidates(planes, annotation, radius) for annotation in annotations]
    counts = EdgeCounts(*(np.zeros(len(thresholds), dtype=np.int64) for _ in COUNTS))
    counts.annotated[:] = annotations.sum()
    for start, plane in zip(range(0, len(thresholds), WORD), planes, strict=True):
        bits = np.arange(min(WORD, len(thresholds) - start))
        fresh = ~_same_as_previous(plane)[bits]
        fresh[0] = True
        counts.predicted[start + bits] = [np.count_nonzero(plane & np.uint64(1 << bit)) for bit in bits.tolist()]
        hits = _match(candidates, start // WORD, bits[fresh], radius)
        # A threshold whose map equals the one before has its counts too (common for saved 8-bit predictions).
        source = np.cumsum(fresh) - 1
        counts.hit_predicted[start + bits], counts.hit_annotated[start + bits] = hits[0][source], hits[1][source]
    return counts


def _same_as_previous(plane: np.ndarray) -> np.ndarray:
    """``[64]`` bool: bit plane k is identical to plane k - 1."""
    differing = int(np.bitwise_or.reduce(plane ^ (plane << np.uint64(1)), axis=None))
    return np.array([not differing >> bit & 1 for bit in range(WORD)])


def _candidates(planes: list[np.ndarray], annotation: np.ndarray, radius: float) -> _Candidates:
    height, width = annotation.shape
    offsets = disc_offsets(radius)
    reach = int(radius)
    stride = width + 2 * reach
    annotated = np.argwhere(annotation)
    flat = (annotated[:, 0] + reach) * stride + annotated[:, 1] + reach
    near = flat[:, None] + (offsets[:, 0] * stride + offsets[:, 1])
    words = [np.pad(plane, reach).reshape(-1)[near] for plane in planes]
    rows, which = np.nonzero(np.bitwise_or.reduce(words) != 0)
    pixels, columns = np.unique(near[rows, which], return_inverse=True)
    return _Candidates(
        rows=rows,
        columns=columns,
        distances=np.hypot(*offsets.T)[which],
        words=[word[rows, which] for word in words],
        num_rows=len(annotated),
        pixels=pixels,
    )


def _match(candidates: list[_Candidates], word: int, bits: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """For each bit plane: predicted pixels matched by any annotation; annotated pixels matched, over annotations."""
    if len(candidates) == 1:
        parts = [bits[i : i + BATCH] for i in range(0, len(bits), BATCH)]
        sizes = np.concatenate([_matching_sizes(candidates[0], word, part) for part in parts])
        return sizes, sizes
    hits = np.zeros((2, len(bits)), dtype=np.int64)
    matched = [np.empty(0, dtype=np.int64)] * len(candidates)
    same = [_same_as_previous(c.words[word]) for c in candidates]
    for k, bit in enumerate(bits.tolist()):
        for a, c in enumerate(candidates):
            if k and same[a][bit]:  # what changed since is far from this annotation
                continue
            here = (c.words[word] & np.uint64(1 << bit)) != 0
            _, columns = min_cost_matching(c.rows[here], c.columns[here], c.distances[here], radius)
            matched[a] = c.pixels[columns]
        hits[0, k] = len(np.unique(np.concatenate(matched)))
        hits[1, k] = sum(len(pixels) for pixels in matched)
    return hits[0], hits[1]


def _matching_sizes(c: _Candidates, word: int, bits: np.ndarray) -> np.ndarray:
    """Sizes of the maximum matchings of several bit planes, solved as one graph of separate parts."""
    chosen = [np.flatnonzero(c.words[word] & np.uint64(1 << bit)) for bit in bits.tolist()]
    edges = np.concatenate(chosen)
    block = np.repeat(np.arange(len(bits)), [len(part) for part in chosen])
    rows = c.rows[edges] + block * c.num_rows
    columns = c.columns[edges] + block * len(c.pixels)
    return max_matching_sizes(rows, columns, block, len(bits))


def precision_recall(
    hit_predicted: np.ndarray, predicted: np.ndarray, hit_annotated: np.ndarray, annotated: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall, 0 where nothing was predicted or annotated."""
    return hit_predicted / np.maximum(predicted, 1), hit_annotated / np.maximum(annotated, 1)


def f_measure(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    return 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def best_f(precision: np.ndarray, recall: np.ndarray, steps: int = 100) -> float:
    """The best F-measure on the precision-recall curve, linear between neighbouring thresholds (as the benchmark)."""
    if len(precision) == 1:
        return float(f_measure(precision, recall)[0])
    mix = np.linspace(0, 1, steps)[:, None]
    between = [(1 - mix) * values[:-1] + mix * values[1:] for values in (precision, recall)]
    return float(f_measure(*between).max())


def average_precision(precision: np.ndarray, recall: np.ndarray) -> float:
    """Mean precision at recalls 0, .01, ..., 1, linear between thresholds and 0 outside the curve.

    As in the benchmark, a threshold above all predictions is the point (0, 0) of the curve. The benchmark gives 0 to a
    curve of one point (all thresholds alike, as for a binary prediction); here it counts as precision times recall.
    """
    recalls, first = np.unique(recall, return_index=True)
    if len(recalls) == 1:
        return float(recalls[0] * precision[first[0]])
    return float(np.interp(np.linspace(0, 1, 101), recalls, precision[first], left=0.0, right=0.0).sum() / 100)


class EdgeScores(SumMetric):
    """``ods_f`` (one threshold for the data set), ``ois_f`` (the best for each image) and ``ap``, in 0..1.

    ``update`` takes logits ``[B, 1, H, W]`` and targets ``[B, A, H, W]`` in {0, 1}, one channel for each of A
    annotators. A pixel that every annotation marks ``IGNORE`` takes no part, an annotation that is ``IGNORE``
    everywhere is missing, and an image without any is skipped. ``max_dist`` is a fraction of the image diagonal.
    ``thin_target`` thins the annotations too, for targets that were enlarged; the benchmark does not. The thresholds
    are ``k / (thresholds + 1)``. ``counter`` counts the pixels of one image (``m3bsr.metrics.bsds.bsds_counts``: by
    the benchmark's own code).
    """

    def __init__(
        self,
        max_dist: float = 0.0075,
        thresholds: int = 99,
        thin_target: bool = False,
        counter: Callable[..., EdgeCounts] = edge_counts,
    ) -> None:
        if max_dist < 0:
            raise ValueError(f"edge metric: max_dist must not be negative, got {max_dist}")
        if thresholds < 1:
            raise ValueError(f"edge metric: needs at least one threshold, got {thresholds}")
        zeros = {name: count(thresholds) for name in COUNTS} | {f"ois_{name}": count() for name in COUNTS}
        super().__init__(**zeros, images=count())
        self.max_dist = max_dist
        self.thresholds = np.arange(1, thresholds + 1) / (thresholds + 1)
        self.thin_target, self.counter = thin_target, counter

    def update(self, prediction: Tensor, target: Tensor) -> None:
        same = prediction.ndim == target.ndim == 4
        same = same and prediction.shape[:1] + prediction.shape[2:] == target.shape[:1] + target.shape[2:]
        if not same or prediction.shape[1] != 1:
            raise ValueError(
                f"edge metric: expected logits [B, 1, H, W] and targets [B, A, H, W], got {tuple(prediction.shape)} "
                f"and {tuple(target.shape)}"
            )
        probability = prediction.detach()[:, 0].double().sigmoid().cpu().numpy()
        for p, t in zip(probability, target.cpu().numpy(), strict=True):
            self.update_probability(p, t)

    def update_probability(self, probability: np.ndarray, annotations: np.ndarray) -> None:
        """Add one image: ``probability [H, W]`` in 0..1 (saved predictions), ``annotations [A, H, W]``."""
        if len(annotations) == 0:
            raise ValueError("edge metric: an image without an annotator; one that is missing is IGNORE everywhere")
        present = annotations[(annotations != IGNORE).any(axis=(1, 2))]
        if not len(present):
            return
        probability = np.where((present == IGNORE).all(axis=0), np.nan, probability)
        drawn = (present != IGNORE) & (present >= 0.5)
        self._add(self.counter(probability, drawn, self.thresholds, self.max_dist, self.thin_target))

    def _add(self, counts: EdgeCounts) -> None:
        best = int(f_measure(*precision_recall(*counts)).argmax())
        for name, values in zip(COUNTS, counts, strict=True):
            self.sums.add(name, torch.from_numpy(values))
            self.sums.add(f"ois_{name}", torch.tensor(int(values[best])))
        self.sums.add("images", torch.ones((), dtype=torch.int64))

    def compute(self) -> dict[str, float]:
        """``ods_f ois_f ap``, and ``threshold``, the best one of the data set; NaN before the first image."""
        if not int(self.sums["images"]):
            return dict.fromkeys(("ods_f", "ois_f", "ap", "threshold"), float("nan"))
        precision, recall = precision_recall(*(self.sums[name].numpy() for name in COUNTS))
        per_image = precision_recall(*(self.sums[f"ois_{name}"].numpy() for name in COUNTS))
        return {
            "ods_f": best_f(precision, recall),
            "ois_f": float(f_measure(*per_image)),
            "ap": average_precision(precision, recall),
            "threshold": float(self.thresholds[f_measure(precision, recall).argmax()]),
        }
