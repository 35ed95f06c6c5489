"""Saliency: the best F-measure over thresholds, and the best mean Jaccard index."""

from __future__ import annotations

import torch
from torch import Tensor

from m3bsr.losses.resample import check_same_size
from m3bsr.metrics.base import SumMetric, count, ratio, real
from m3bsr.utils.constants import IGNORE

NUM_LEVELS = 256
"""Probabilities are cut at k / 255, k = 0..255, as if the map had been saved as an 8-bit picture."""

JACCARD_THRESHOLDS = torch.linspace(0.2, 0.9, 15, dtype=torch.float64)


class SaliencyScores(SumMetric):
    """``max_f`` (beta^2 = 0.3) and ``max_f1`` (beta^2 = 1) pooled over pixels; ``miou`` averaged over images.

    ``update`` takes logits and targets ``[B, 1, H, W]``; targets are salient from .5 on, ``IGNORE`` is invalid.
    The F-measures pool all pixels of all images and take the best of 256 thresholds (InvPT's protocol). ``miou`` is
    the Jaccard index of the salient region, averaged over images at each of 15 thresholds in .2..9, at the best one
    (ASTMT's protocol, PASCAL-Context). An image with nothing salient and nothing predicted counts as 1; one without
    any valid pixel does not count.
    """

    def __init__(self) -> None:
        super().__init__(
            positives=count(NUM_LEVELS),
            negatives=count(NUM_LEVELS),
            jaccard=real(len(JACCARD_THRESHOLDS)),
            images=count(),
        )

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.update_probability(prediction.detach().double().sigmoid(), target)

    def update_probability(self, probability: Tensor, target: Tensor) -> None:
        """The same for probabilities in 0..1, float64 ``[B, 1, H, W]`` (saved predictions)."""
        check_same_size(probability, target, "saliency metrics")
        for p, t in zip(probability, target, strict=True):
            valid = t != IGNORE
            if valid.any():
                self._add_image(p[valid], t[valid] >= 0.5)

    def _add_image(self, probability: Tensor, salient: Tensor) -> None:
        # Without the slack a probability k / 255 may come out as level k - 1.
        levels = (probability * (NUM_LEVELS - 1) + 1e-9).long()
        self.sums.add("positives", torch.bincount(levels[salient], minlength=NUM_LEVELS))
        self.sums.add("negatives", torch.bincount(levels[~salient], minlength=NUM_LEVELS))
        # Sorting once counts the pixels above all thresholds; a comparison each would read the image 15 times.
        thresholds = JACCARD_THRESHOLDS.to(probability.device)
        hits = _count_at_least(probability[salient], thresholds)
        marked = _count_at_least(probability, thresholds)
        union = marked + salient.sum() - hits
        self.sums.add("jaccard", torch.where(union > 0, hits.double() / union.clamp(min=1), 1.0))
        self.sums.add("images", torch.ones((), dtype=torch.int64))

    def compute(self) -> dict[str, float]:
        """``max_f max_f1 miou`` in 0..1; NaN if no valid pixel was seen."""
        hits = self.sums["positives"].flip(0).cumsum(0).double()
        marked = hits + self.sums["negatives"].flip(0).cumsum(0)
        total = self.sums["positives"].sum().double()
        seen = int(self.sums["images"]) > 0

        def best_f(beta_squared: float) -> float:
            # F = (1 + b) P R / (b P + R) written in counts, which needs no care where P or R has no value.
            score = (1 + beta_squared) * hits / (beta_squared * total + marked).clamp(min=1e-12)
            return float(score.max()) if seen else float("nan")

        return {
            "max_f": best_f(0.3),
            "max_f1": best_f(1.0),
            "miou": ratio(self.sums["jaccard"].max(), self.sums["images"]),
        }


def _count_at_least(values: Tensor, thresholds: Tensor) -> Tensor:
    ordered = values.sort().values
    return values.numel() - torch.searchsorted(ordered, thresholds)
