"""Top-1 and top-5 accuracy and the confusion matrix of a classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from m3bsr.metrics.base import SumMetric, count, ratio
from m3bsr.utils.constants import NO_CLASS


class Accuracy(SumMetric):
    """Shares of images whose class is the best guess (``top1``) or among the five best (``top5``).

    ``update`` takes logits ``[B, C]`` and class indices ``[B]`` (``NO_CLASS`` does not count). Ties count for the
    class with the lower index.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(confusion=count((num_classes, num_classes)), top5=count())
        self.num_classes = num_classes

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """ValueError for shapes that do not fit, or a label that is no class."""
        if prediction.ndim != 2 or prediction.shape[1] != self.num_classes or target.shape != prediction.shape[:1]:
            raise ValueError(
                f"accuracy: expected logits [B, {self.num_classes}] and labels [B], "
                f"got {tuple(prediction.shape)} and {tuple(target.shape)}"
            )
        prediction, target = prediction[target != NO_CLASS], target[target != NO_CLASS]
        if target.numel() == 0:
            return
        if not 0 <= int(target.min()) <= int(target.max()) < self.num_classes:
            raise ValueError(
                f"label out of range: found {int(target.min())}..{int(target.max())}, "
                f"expected 0..{self.num_classes - 1}"
            )
        best = prediction.detach().argsort(dim=1, descending=True, stable=True)[:, :5]
        pairs = target * self.num_classes + best[:, 0]
        matrix = torch.bincount(pairs, minlength=self.num_classes**2).view(self.num_classes, self.num_classes)
        self.sums.add("confusion", matrix)
        self.sums.add("top5", (best == target[:, None]).any(dim=1).sum())

    def confusion(self) -> Tensor:
        """``[C, C]`` int64 counts: row = true class, column = predicted."""
        return self.sums["confusion"].clone()

    def compute(self) -> dict[str, float]:
        """``top1``, ``mean_accuracy`` (mean over classes seen), and with more than five classes ``top5``, in 0..1."""
        matrix = self.sums["confusion"]
        num = matrix.sum()
        per_class = matrix.diagonal().double() / matrix.sum(dim=1).double()
        values = {"top1": ratio(matrix.trace(), num), "mean_accuracy": float(per_class.nanmean())}
        if self.num_classes > 5:
            values["top5"] = ratio(self.sums["top5"], num)
        return values
