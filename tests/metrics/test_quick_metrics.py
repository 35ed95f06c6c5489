"""mIoU, depth, normals, saliency and delta_m against direct formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import f1_score, fbeta_score, jaccard_score

from m3bsr.metrics import DepthErrors, MeanIoU, NormalAngles, SaliencyScores, delta_m, relative_gains
from m3bsr.metrics.normals import angles_between
from m3bsr.utils.constants import IGNORE


def test_confusion_matrix_and_miou_against_sklearn():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11, 13), torch.randint(6, (3, 1, 11, 13))
    labels[torch.rand(labels.shape) < 0.2] = IGNORE
    logits[:, 5] -= 9  # class 5 is labelled but never predicted
    metric = MeanIoU(7)
    metric.update(logits, labels)
    valid = labels[:, 0] != IGNORE
    true, predicted = labels[:, 0][valid].numpy(), logits.argmax(1)[valid].numpy()
    assert np.array_equal(metric.state()["confusion"], sklearn_confusion(true, predicted, labels=range(7)))
    scores = metric.compute()
    expected = jaccard_score(true, predicted, average=None, labels=range(7), zero_division=0)
    expected[6] = expected[6] if (true == 6).any() or (predicted == 6).any() else np.nan
    assert metric.per_class().numpy() == pytest.approx(expected, nan_ok=True)
    assert scores["miou"] == pytest.approx(np.nanmean(expected))
    assert scores["pixel_accuracy"] == pytest.approx((true == predicted).mean())


def test_a_class_that_never_occurs_is_left_out_of_the_mean():
    logits = torch.zeros(1, 3, 1, 4)
    logits[0, 0, 0, :2] = logits[0, 1, 0, 2:] = 1
    metric = MeanIoU(3)
    metric.update(logits, torch.tensor([0, 0, 1, 0]).view(1, 1, 1, 4))
    assert metric.compute()["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metric.per_class()[2].isnan()


def test_labels_out_of_range_are_an_error():
    with pytest.raises(ValueError, match=r"label out of range: found 0..3, expected 0..2 or 255"):
        MeanIoU(3).update(torch.zeros(1, 3, 2, 2), torch.tensor([[[[0, 1], [3, 255]]]]))
    with pytest.raises(ValueError, match="2 channels, expected 3"):
        MeanIoU(3).update(torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2))


def test_depth_against_direct_float64():
    rng = np.random.default_rng(0)
    true, predicted = rng.uniform(0.4, 9, (2, 1, 9, 8)), rng.uniform(-0.5, 9, (2, 1, 9, 8))
    true[0, 0, 0], true[0, 0, 1] = IGNORE, 0.0  # both invalid
    metric = DepthErrors()
    metric.update(torch.tensor(predicted), torch.tensor(true))
    t, p = true[(true != IGNORE) & (true > 0)], predicted[(true != IGNORE) & (true > 0)]
    positive = np.maximum(p, 1e-3)
    factor = np.maximum(positive / t, t / positive)
    expected = {
        "rmse": np.sqrt(((p - t) ** 2).mean()),
        "log_rmse": np.sqrt(((np.log(positive) - np.log(t)) ** 2).mean()),
        "abs_rel": (np.abs(p - t) / t).mean(),
        "sq_rel": ((p - t) ** 2 / t).mean(),
        "delta1": (factor < 1.25).mean(),
        "delta2": (factor < 1.25**2).mean(),
        "delta3": (factor < 1.25**3).mean(),
    }
    assert metric.compute() == pytest.approx(expected, rel=1e-12)


def test_depth_pools_pixels_not_images():
    metric = DepthErrors()
    metric.update(
        torch.tensor([1.0, 9, 9, 9]).view(1, 1, 1, 4), torch.tensor([2.0, IGNORE, IGNORE, IGNORE]).view(1, 1, 1, 4)
    )
    metric.update(torch.full((1, 1, 1, 3), 2.0), torch.full((1, 1, 1, 3), 2.0))
    assert metric.compute()["rmse"] == pytest.approx(0.5)


def test_angles_against_acos_and_at_the_ends():
    torch.manual_seed(0)
    p, g = torch.randn(1, 3, 20, 30), torch.randn(1, 3, 20, 30)
    unit_p = p.double() / p.double().norm(dim=1, keepdim=True)
    unit_g = g.double() / g.double().norm(dim=1, keepdim=True)
    expected = torch.rad2deg((unit_p * unit_g).sum(1).clamp(-1, 1).acos())
    assert torch.allclose(angles_between(p, g), expected, atol=1e-6)
    x = torch.tensor([0.0, 0, 1]).view(1, 3, 1)
    tilted = torch.tensor([1e-9, 0, 1], dtype=torch.float64).view(1, 3, 1)
    assert float(angles_between(tilted, x)) == pytest.approx(math.degrees(1e-9), rel=1e-6)
    assert float(angles_between(-3 * x, x)) == 180 and float(angles_between(0 * x, x)) == pytest.approx(90)


def test_normals_statistics_against_numpy():
    torch.manual_seed(1)
    target = torch.nn.functional.normalize(torch.randn(2, 3, 25, 31), dim=1)
    prediction = 4 * target + 1.3 * torch.randn_like(target)
    target[1, :, :4] = IGNORE
    metric = NormalAngles()
    metric.update(prediction, target)
    angles = angles_between(prediction, target)[(target != IGNORE).all(1)].numpy()
    scores = metric.compute()
    assert scores["mean"] == pytest.approx(angles.mean(), rel=1e-12)
    assert scores["rmse"] == pytest.approx(np.sqrt((angles**2).mean()), rel=1e-12)
    assert scores["rmse"] > scores["mean"]
    assert scores["median"] == pytest.approx(np.sort(angles)[(len(angles) - 1) // 2], abs=0.01)
    for limit in (11.25, 22.5, 30):
        assert scores[f"within_{limit:g}"] == pytest.approx((angles < limit).mean())


def test_saliency_against_sklearn_at_every_threshold():
    rng = np.random.default_rng(0)
    true = rng.random((3, 1, 8, 9)) > 0.7
    # 8-bit values, so that the pooled thresholds are exact.
    levels = np.clip(rng.integers(0, 200, true.shape) + 60 * true, 1, 254)
    probability = (levels + 0.5) / 255
    metric = SaliencyScores()
    metric.update(torch.tensor(np.log(probability / (1 - probability))), torch.tensor(true, dtype=torch.float32))
    y = true.ravel()
    cuts = [levels.ravel() >= k for k in range(1, 255)]
    scores = metric.compute()
    assert scores["max_f"] == pytest.approx(
        max(fbeta_score(y, cut, beta=math.sqrt(0.3), zero_division=0) for cut in cuts), rel=1e-9
    )
    assert scores["max_f1"] == pytest.approx(max(f1_score(y, cut, zero_division=0) for cut in cuts), rel=1e-9)
    per_threshold = [
        np.mean([jaccard_score(t.ravel(), p.ravel() >= cut) for t, p in zip(true, probability, strict=True)])
        for cut in np.linspace(0.2, 0.9, 15)
    ]
    assert scores["miou"] == pytest.approx(max(per_threshold), rel=1e-9)


def test_saliency_of_a_perfect_map_is_one():
    target = (torch.arange(20).view(1, 1, 4, 5) % 3 == 0).float()
    metric = SaliencyScores()
    metric.update((target - 0.5) * 60, target)
    assert metric.compute() == pytest.approx({"max_f": 1.0, "max_f1": 1.0, "miou": 1.0})


def test_delta_m_reproduces_a_published_row():
    """M3ViT's multi-gate row on NYUD (mIoU 45.6, rmse .589 against 43.9 and .585) is +1.59 % in its table."""
    value = delta_m(
        {"semseg": 45.6, "depth": 0.589}, {"semseg": 43.9, "depth": 0.585}, {"semseg": True, "depth": False}
    )
    assert 100 * value == pytest.approx(1.59, abs=0.01)


def test_delta_m_signs_and_errors():
    gains = relative_gains({"a": 2.0, "b": 2.0}, {"a": 1.0, "b": 1.0}, {"a": True, "b": False})
    assert gains == {"a": 1.0, "b": -1.0}
    with pytest.raises(ValueError, match="no score or direction for task 'c'"):
        delta_m({"a": 1.0}, {"c": 1.0}, {"a": True})
    with pytest.raises(ValueError, match="the baseline of task 'a' is 0"):
        delta_m({"a": 1.0}, {"a": 0.0}, {"a": True})
    with pytest.raises(ValueError, match="no baselines"):
        delta_m({"a": 1.0}, {}, {"a": True})
