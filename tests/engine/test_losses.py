"""Losses of a batch whose targets were sampled by the loader."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from m3bsr.engine.losses import SmallTargets, loss_size, task_losses
from m3bsr.tasks import TASKS

DENSE = {name: kind() for name, kind in TASKS.items() if kind.dense}


@pytest.mark.parametrize("stride", [2, 4])
def test_targets_sampled_by_the_loader_give_the_same_losses(stride):
    """Of every dense task, to the bit; what has no size, or no label in this batch, is left alone."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 17, 23)
    batch = {"image": images, "name": ["a", "b"], "classification": torch.tensor([1, 2])}
    for name, task in DENSE.items():
        label = torch.rand(2, 3 if name == "normals" else 1, 17, 23)
        batch[name] = label if name in ("normals", "depth") else label.round().to(task.example_target(1, (1, 1)).dtype)
    small = SmallTargets({**DENSE, "elsewhere": TASKS["depth"]()}, stride)(batch)
    assert small["image"] is images and small["name"] == ["a", "b"] and "elsewhere" not in small
    assert torch.equal(small["classification"], batch["classification"])
    size = loss_size(images, stride)
    assert all(small[name].shape[-2:] == size and small[name].is_contiguous() for name in DENSE)
    assert sum(small[name].nbytes for name in DENSE) < sum(batch[name].nbytes for name in DENSE) / 2
    predictions = {name: torch.rand(2, task.num_channels, *size) + 0.1 for name, task in DENSE.items()}
    zero = torch.zeros(())
    output = SimpleNamespace(predictions=predictions, balance_loss=zero, z_loss=zero)
    weights = dict.fromkeys(DENSE, 1.0)
    full, sampled = (task_losses(output, targets, DENSE, weights) for targets in (batch, small))
    assert full.keys() == sampled.keys() and all(torch.equal(full[name], sampled[name]) for name in full)
