"""Mixup and CutMix: pictures and classes in one proportion, the same whoever loads the batch."""

from __future__ import annotations

import pytest
import torch

from m3bsr.data.mix import MixImages
from m3bsr.engine.loader import train_loader
from m3bsr.tasks import TASKS
from m3bsr.utils.constants import NO_CLASS


class Ones(torch.utils.data.Dataset):
    """Image ``i`` is filled with its class, 0 or 1."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        label = index % 2
        return {"image": torch.full((3, 8, 8), float(label)), "cls": torch.tensor(label), "name": str(index)}


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_share_of_the_class_is_the_share_of_the_picture(mixup, cutmix):
    torch.manual_seed(0)
    mix = MixImages({"other": 3, "cls": 2}, mixup, cutmix)
    batch = {"image": torch.zeros(8, 3, 8, 8), "cls": torch.zeros(8, dtype=torch.int64), "name": list("abcdefgh")}
    batch["image"][::2], batch["cls"][::2] = 1.0, 1
    for _ in range(5):
        mixed = mix(batch)
        assert mixed["cls"].shape == (8, 2) and torch.allclose(mixed["cls"].sum(1), torch.ones(8))
        torch.testing.assert_close(mixed["image"].mean((1, 2, 3)), mixed["cls"][:, 1])
        assert mixed["name"] == batch["name"] and torch.equal(batch["image"][0], torch.ones(3, 8, 8))
    unlabelled = {"image": batch["image"]}
    assert mix(unlabelled) is unlabelled


def test_mixing_hangs_on_the_place_in_the_run_alone():
    mix = MixImages({"cls": 2}, 0.8, 1.0)
    loading = {"batch_size": 4, "seed": 3, "batch_transform": mix}
    whole = [b["cls"] for b in train_loader(Ones(), start_step=0, stop_step=6, **loading)]
    rest = [b["cls"] for b in train_loader(Ones(), start_step=3, stop_step=6, num_workers=1, **loading)]
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))
    assert not torch.equal(whole[0], whole[2])


def test_loss_of_mixed_classes_is_the_mean_of_both():
    task = TASKS["classification"](num_classes=3)
    logits, soft = torch.randn(2, 3), torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    parts = [task.loss(logits[:1], torch.tensor([i])) for i in (0, 1)]
    expected = (0.25 * parts[0] + 0.75 * parts[1] + task.loss(logits[1:], torch.tensor([2]))) / 2
    torch.testing.assert_close(task.loss(logits, soft), expected)


def test_images_without_a_class_lend_nothing_to_the_targets():
    torch.manual_seed(0)
    mix, task = MixImages({"cls": 2}, 0.8, 1.0), TASKS["classification"](num_classes=2, label_smoothing=0.1)
    labels = torch.tensor([0, 1, NO_CLASS, NO_CLASS])
    mixed = mix({"image": torch.rand(4, 3, 8, 8), "cls": labels})["cls"]
    assert mixed.shape == (4, 2) and float(mixed.sum()) == pytest.approx(2)
    logits = torch.randn(4, 2)
    unmixed = torch.nn.functional.one_hot(labels.clamp(min=0), 2) * (labels != NO_CLASS)[:, None]
    torch.testing.assert_close(task.loss(logits, unmixed.float()), task.loss(logits, labels))
    assert task.loss(logits, torch.zeros(4, 2)) == 0
