"""Accuracy beside torchmetrics, in one piece and in streams."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from m3bsr.metrics import Accuracy
from m3bsr.utils.constants import NO_CLASS


@pytest.mark.parametrize("num_classes", [3, 6, 40])
def test_agrees_with_torchmetrics_whatever_the_batches(num_classes):
    torch.manual_seed(num_classes)
    logits, labels = torch.randn(101, num_classes), torch.randint(num_classes, (101,))
    metric = Accuracy(num_classes)
    for part_logits, part_labels in zip(logits.split(17), labels.split(17), strict=True):
        metric.update(part_logits, part_labels)
    values = metric.compute()
    kwargs = {"num_classes": num_classes, "average": "micro"}
    assert values["top1"] == pytest.approx(float(multiclass_accuracy(logits, labels, **kwargs)))
    assert ("top5" in values) == (num_classes > 5)
    if num_classes > 5:
        assert values["top5"] == pytest.approx(float(multiclass_accuracy(logits, labels, top_k=5, **kwargs)))
    assert torch.equal(metric.confusion(), multiclass_confusion_matrix(logits, labels, num_classes))
    mean = multiclass_accuracy(logits, labels, num_classes=num_classes, average="none")
    seen = torch.bincount(labels, minlength=num_classes) > 0
    assert values["mean_accuracy"] == pytest.approx(float(mean[seen].mean()))


def test_images_without_a_class_do_not_count():
    metric = Accuracy(3)
    metric.update(torch.eye(3), torch.tensor([0, NO_CLASS, 1]))
    assert metric.compute()["top1"] == 0.5


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), "label out of range: found 0..3, expected 0..2"),
        (torch.zeros(2, 4), torch.tensor([0, 1]), r"expected logits \[B, 3\]"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), r"labels \[B\]"),
    ],
)
def test_bad_input_is_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        Accuracy(3).update(logits, labels)
