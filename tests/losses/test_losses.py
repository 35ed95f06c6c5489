from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3bsr.losses import (
    at_stride,
    balanced_bce,
    cross_entropy,
    depth_l1,
    normals_l1,
    resize_nearest,
    weighted_bce,
)
from m3bsr.utils.constants import IGNORE

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    "semseg": (cross_entropy, "semseg/logits", "semseg/target"),
    "depth": (depth_l1, "depth/pred", "depth/target"),
    "normals": (normals_l1, "normals/pred", "normals/target"),
    "edge": (weighted_bce, "edge/logits", "edge/target"),
    "saliency": (balanced_bce, "edge/logits", "edge/target"),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_value(name):
    loss, prediction, target = CASES[name]
    tensors = load_file(GOLDEN / "losses.safetensors")
    expected = json.loads((GOLDEN / "losses.json").read_text())["value"][name]
    assert float(loss(tensors[prediction], tensors[target])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_invalid_pixels_have_no_influence(name):
    """Whatever is predicted at an invalid pixel, be it infinite, value and gradient stay the same and finite."""
    loss, prediction, target = CASES[name]
    tensors = load_file(GOLDEN / "losses.safetensors")
    target = tensors[target].clone()
    target[:, :, :3] = IGNORE
    first = tensors[prediction].clone()
    second = first.clone()
    second[:, :, :3] = 1e4 if name == "semseg" else float("inf")
    gradients = []
    for x in (first, second):
        x.requires_grad_()
        value = loss(x, target)
        value.backward()
        gradients.append((value.detach(), x.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])
    assert (gradients[0][1][:, :, :3] == 0).all() and (gradients[0][1][:, :, 3:] != 0).any()


def test_normals_gradient_is_finite_at_a_zero_vector():
    prediction = torch.zeros(1, 3, 2, 2, requires_grad=True)
    target = torch.tensor([0.0, 0.6, 0.8]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    normals_l1(prediction, target).backward()
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize("name", ["normals", "edge", "saliency"])
def test_gradcheck(name, monkeypatch):
    # The losses compute in float32 by design; the formulas are checked in float64.
    loss, *_ = CASES[name]
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    monkeypatch.setattr(torch, "float32", torch.float64)
    torch.manual_seed(0)
    channels = 3 if name == "normals" else 1
    prediction = torch.randn(2, channels, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, channels, 3, 4, dtype=torch.float64)
    target = torch.nn.functional.normalize(target, dim=1) if name == "normals" else (target > 0).double()
    target[0, :, 0] = IGNORE
    assert torch.autograd.gradcheck(lambda x: loss(x, target), prediction)


def test_depth_and_cross_entropy_against_plain_python():
    torch.manual_seed(1)
    prediction, target = torch.randn(2, 1, 4, 5), torch.rand(2, 1, 4, 5) * 5
    target[0, 0, 1] = IGNORE
    pairs = [(float(p), float(t)) for p, t in zip(prediction.flatten(), target.flatten(), strict=True) if t != IGNORE]
    expected = sum(abs(p - t) for p, t in pairs) / len(pairs)
    assert float(depth_l1(prediction, target)) == pytest.approx(expected, rel=1e-6)

    logits, labels = torch.randn(1, 3, 2, 2), torch.tensor([[[[0, 2], [IGNORE, 1]]]])
    valid = [(0, 0, 0), (0, 1, 2), (1, 1, 1)]
    terms = [-float(logits[0, :, y, x].log_softmax(0)[c]) for y, x, c in valid]
    assert float(cross_entropy(logits, labels)) == pytest.approx(sum(terms) / 3, rel=1e-6)


def test_balanced_weight_is_the_negative_fraction_of_valid_pixels():
    logits = torch.zeros(1, 1, 1, 6)
    target = torch.tensor([1.0, 0.0, 0.0, 0.0, IGNORE, IGNORE]).view(1, 1, 1, 6)
    # One positive weighs 3/4, three negatives 1/4 each; every BCE is log 2; mean over 4 valid pixels.
    expected = (0.75 + 3 * 0.25) * torch.tensor(2.0).log() / 4
    assert torch.allclose(balanced_bce(logits, target), expected)


def test_size_mismatch_is_one_clear_line():
    with pytest.raises(ValueError, match=r"differ in batch or size; resize the target with Task.resize_target"):
        depth_l1(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("size", [(4, 5), (3, 7), (8, 10), (11, 13), (1, 1)])
def test_resize_nearest_is_nearest_exact(size):
    target = torch.arange(8 * 10, dtype=torch.float32).view(1, 1, 8, 10)
    expected = torch.nn.functional.interpolate(target, size=size, mode="nearest-exact")
    assert torch.equal(resize_nearest(target, size), expected)
    assert torch.equal(resize_nearest(target.long(), size), expected.long())


def test_at_stride_rounds_up_and_keeps_marks():
    target = torch.full((2, 1, 9, 10), IGNORE)
    sampled = at_stride(target, 4)
    assert sampled.shape == (2, 1, 3, 3) and (sampled == IGNORE).all() and sampled.dtype == torch.int64
    assert at_stride(target, 1) is target
    with pytest.raises(ValueError, match="stride"):
        at_stride(target, 0)
