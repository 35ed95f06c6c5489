"""Contract of every entry of TASKS."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from m3bsr.data import transforms
from m3bsr.metrics.base import Metric
from m3bsr.tasks import TASKS, Task
from m3bsr.tasks.base import label_palette
from m3bsr.utils.constants import IGNORE, NO_CLASS

DENSE = [name for name, kind in TASKS.items() if kind.dense]
INVALID = {name: IGNORE if kind.dense else NO_CLASS for name, kind in TASKS.items()}
WEIGHTS = {"classification": 1, "semseg": 1, "human_parts": 2, "saliency": 5, "edge": 50, "normals": 10, "depth": 1}


def make(name: str, batch: int = 2, size: tuple[int, int] = (17, 23)):
    """A task, raw outputs and a target with a few invalid rows (of one class per image: the last image invalid)."""
    torch.manual_seed(0)
    if name == "classification":
        task = TASKS[name](num_classes=7)
        target = torch.randint(7, (batch,))
        target[1:][-1:] = NO_CLASS
        return task, torch.randn(batch, 7), target
    task = TASKS[name](thresholds=9) if name == "edge" else TASKS[name]()
    prediction = torch.randn(batch, task.num_channels, *size)
    if task.main_metric == "miou" and name != "saliency":
        target = torch.randint(task.num_channels, (batch, 1, *size))
    elif name == "depth":
        prediction, target = prediction + 3, torch.rand(batch, 1, *size) * 9 + 0.5
    elif name == "normals":
        target = torch.nn.functional.normalize(torch.randn(batch, 3, *size), dim=1)
    else:
        target = (torch.rand(batch, 1, *size) > 0.8).float()
    target[:, :, :2] = IGNORE
    return task, prediction, target


@pytest.mark.parametrize("name", TASKS)
def test_attributes(name):
    task = TASKS[name]()
    assert isinstance(task, Task) and task.name == name
    assert task.default_weight == WEIGHTS[name]
    assert isinstance(task.higher_is_better, bool) and isinstance(task.metric(), Metric)


@pytest.mark.parametrize("size", [(17, 23), (1, 1), (8, 9)])
@pytest.mark.parametrize("name", TASKS)
def test_loss_is_a_finite_scalar_at_any_size_and_batch_one(name, size):
    task, prediction, target = make(name, batch=1, size=size)
    prediction.requires_grad_()
    loss = task.loss(prediction, target)
    loss.backward()
    assert loss.shape == () and loss.isfinite() and prediction.grad.isfinite().all()


@pytest.mark.parametrize("name", TASKS)
def test_nothing_valid_is_zero_with_zero_gradient(name):
    task, prediction, target = make(name)
    prediction.requires_grad_()
    loss = task.loss(prediction, torch.full_like(target, INVALID[name]))
    loss.backward()
    assert float(loss.detach()) == 0 and (prediction.grad == 0).all()
    metric = task.metric()
    metric.update(prediction.detach(), torch.full_like(target, INVALID[name]))
    assert np.isnan(metric.compute()[task.main_metric])


@pytest.mark.parametrize("name", TASKS)
def test_half_precision_predictions_are_computed_in_single(name):
    task, prediction, target = make(name)
    rounded = prediction.bfloat16()
    assert task.loss(rounded, target).dtype == torch.float32
    assert float(task.loss(rounded, target)) == pytest.approx(float(task.loss(rounded.float(), target)), rel=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_streaming_merging_and_one_shot_agree(name):
    task, prediction, target = make(name, batch=4)
    whole, stream, left, right = (task.metric() for _ in range(4))
    whole.update(prediction, target)
    for i in range(4):
        stream.update(prediction[i : i + 1], target[i : i + 1])
        (left if i < 1 else right).update(prediction[i : i + 1], target[i : i + 1])
    left.merge(right.state())
    expected = whole.compute()
    assert task.main_metric in expected
    assert all(isinstance(value, float) and np.isfinite(value) for value in expected.values())
    assert stream.compute() == pytest.approx(expected, rel=1e-12)
    assert left.compute() == pytest.approx(expected, rel=1e-12)
    assert sum(value.numel() for value in whole.state().values()) < 20_000
    whole.reset()
    assert np.isnan(whole.compute()[task.main_metric])
    assert left.compute() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_invalid_pixels_do_not_score(name):
    task, prediction, target = make(name)
    other = prediction.clone()
    invalid = (slice(None), slice(None), slice(2)) if task.dense else slice(-1, None)
    other[invalid] = -other[invalid] * 7
    scores = []
    for x in (prediction, other):
        metric = task.metric()
        metric.update(x, target)
        scores.append(metric.compute())
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", TASKS)
def test_merge_refuses_a_foreign_state(name):
    metric = TASKS[name]().metric()
    with pytest.raises(ValueError, match="cannot merge metric states"):
        metric.merge({"something": torch.zeros(1)})


@pytest.mark.parametrize("name", DENSE)
def test_colour(name):
    task, prediction, target = make(name)
    for x, is_prediction in ((prediction[0], True), (target[0], False)):
        picture = task.colour(x, is_prediction=is_prediction)
        assert picture.shape == (17, 23, 3) and picture.dtype == np.uint8
        assert np.array_equal(picture, task.colour(x, is_prediction=is_prediction))
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1
    assert (task.colour(target[0])[:2] == task.colour(target[0])[0, 0]).all()
    with pytest.raises(ValueError, match="cannot colour"):
        task.colour(torch.zeros(task.num_channels + 9, 4, 4), is_prediction=True)


@pytest.mark.parametrize("name", DENSE)
def test_loss_at_a_stride_follows_the_full_loss(name):
    """Smooth fields lose little by sampling: the strided loss of a constant prediction stays near the full one."""
    task, prediction, _ = make(name, batch=1, size=(32, 32))
    _, _, target = make(name, batch=1, size=(64, 64))
    small = task.resize_target(target, (32, 32))
    assert small.dtype == target.dtype and small.shape == (1, target.shape[1], 32, 32)
    assert task.loss(prediction, small).isfinite()
    # The batch statistics of noise labels differ a little between the two grids.
    constant = torch.full((1, task.num_channels, 1, 1), 0.3)
    full = task.loss(constant.expand(-1, -1, 64, 64), target)
    sampled = task.loss(constant.expand(-1, -1, 32, 32), small)
    assert float(sampled) == pytest.approx(float(full), rel=0.15)


@pytest.mark.parametrize("name", DENSE)
def test_saved_predictions_score_as_raw_ones(name):
    """Classes and metres to the bit, unit vectors to float32, probabilities to 1 / 255."""
    task, prediction, target = make(name)
    saved = task.to_saved(prediction)
    assert saved.shape == (2, task.saved_channels, 17, 23)
    assert saved.dtype == (torch.uint8 if task.saved_suffixes[0] == ".png" else torch.float32)
    raw, read = task.metric(), task.metric()
    raw.update(prediction, target)
    task.add_saved(read, saved, target)
    exact = name in ("semseg", "human_parts", "depth")
    for metric, value in raw.compute().items():
        if exact or metric.startswith("max_f"):
            assert read.compute()[metric] == value
        elif metric != "threshold":  # which of two nearly equal ones is best may change
            assert read.compute()[metric] == pytest.approx(value, abs=1e-4 if name == "normals" else 0.02)


@pytest.mark.parametrize("name", DENSE)
def test_a_mirrored_target_is_the_target_of_the_mirrored_image(name):
    task, prediction, target = make(name)
    kind = {"normals": transforms.Normals, "depth": transforms.Depth}.get(name, transforms.Edge)
    for image, label in zip(task.mirrored(target), target, strict=True):
        assert torch.equal(image, transforms.flip({name: kind(label)})[name].as_subclass(torch.Tensor))
    assert torch.equal(task.mirrored(task.mirrored(prediction)), prediction)


def test_averages():
    a, b = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1), torch.tensor([0.0, 0, 9]).view(1, 3, 1, 1)
    mean = TASKS["normals"]().average([a, b])
    assert torch.allclose(mean.flatten(), torch.tensor([0.5, 0, 0.5]), atol=1e-6), "lengths do not count"
    assert torch.equal(TASKS["depth"]().average([a, b]), (a + b) / 2)


def test_palette_is_distinct_and_ignore_is_black():
    palette = label_palette(40)
    assert len(np.unique(palette[:40], axis=0)) == 40
    assert (palette[IGNORE] == 0).all() and palette[:40].any(axis=1).all()


def test_normals_colours_are_half_of_one_plus_n():
    facing = torch.tensor([0.0, 0.0, 5.0]).view(3, 1, 1)
    assert TASKS["normals"]().colour(facing, is_prediction=True)[0, 0].tolist() == [128, 128, 255]


def test_bad_arguments_name_the_task():
    with pytest.raises(ValueError, match="semseg: num_classes"):
        TASKS["semseg"](num_classes=0)
    with pytest.raises(ValueError, match="edge: positive_weight"):
        TASKS["edge"](positive_weight=1.0)


def test_a_class_has_no_size_and_no_colour():
    task, _, target = make("classification", batch=3)
    assert torch.equal(task.resize_target(target, (4, 4)), target) and task.example_target(2, (8, 8)).shape == (2,)
    with pytest.raises(ValueError, match="a class is no picture"):
        task.colour(target)
    with pytest.raises(ValueError, match="classification: label_smoothing"):
        TASKS["classification"](label_smoothing=1.0)
