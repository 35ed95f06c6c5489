"""Mean intersection over union and pixel accuracy from one streamed confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from m3bsr.losses.resample import check_same_size
from m3bsr.metrics.base import SumMetric, count, ratio
from m3bsr.utils.constants import IGNORE


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """``[C, C]`` int64 counts, row = true class, column = predicted; integer tensors of one shape, ``IGNORE`` skipped.

    ValueError for a label that is neither a class nor ``IGNORE``, or a prediction that is no class.
    """
    valid = labels != IGNORE
    labels, predicted = labels[valid].long(), predicted[valid].long()
    for what, values in (("label", labels), ("predicted class", predicted)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise ValueError(
                f"{what} out of range: found {int(values.min())}..{int(values.max())}, expected 0..{num_classes - 1}"
                + (f" or {IGNORE} (ignore)" if what == "label" else "")
            )
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


class MeanIoU(SumMetric):
    """mIoU, pixel accuracy and mean class accuracy, pooled over all pixels seen.

    ``update`` takes logits ``[B, C, H, W]`` and labels ``[B, 1, H, W]``. Classes that occur neither in a label nor in
    a prediction have no IoU and are left out of the mean (on the full NYUD and PASCAL-Context every class occurs).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(confusion=count((num_classes, num_classes)))
        self.num_classes = num_classes

    def update(self, prediction: Tensor, target: Tensor) -> None:
        check_same_size(prediction, target, "mIoU")
        if prediction.shape[1] != self.num_classes:
            raise ValueError(f"mIoU: prediction has {prediction.shape[1]} channels, expected {self.num_classes}")
        predicted = prediction.detach().argmax(dim=1)
        self.sums.add("confusion", confusion_matrix(predicted, target[:, 0], self.num_classes))

    def update_labels(self, predicted: Tensor, target: Tensor) -> None:
        """The same for classes that were chosen already, ``[B, 1, H, W]`` integers."""
        check_same_size(predicted, target, "mIoU")
        self.sums.add("confusion", confusion_matrix(predicted[:, 0], target[:, 0], self.num_classes))

    def per_class(self) -> Tensor:
        """IoU of each class ``[C]`` (float64), NaN for a class never seen."""
        matrix = self.sums["confusion"].double()
        hit = matrix.diagonal()
        return hit / (matrix.sum(dim=0) + matrix.sum(dim=1) - hit)

    def compute(self) -> dict[str, float]:
        """``miou``, ``pixel_accuracy``, ``mean_accuracy`` in 0..1; NaN if no valid pixel was seen."""
        matrix = self.sums["confusion"].double()
        return {
            "miou": float(self.per_class().nanmean()),
            "pixel_accuracy": ratio(matrix.trace(), matrix.sum()),
            "mean_accuracy": float((matrix.diagonal() / matrix.sum(dim=1)).nanmean()),
        }
