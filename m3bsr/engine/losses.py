"""From predictions to the number that training lowers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3bsr.tasks.base import Task


def loss_size(images: Tensor, stride: int) -> tuple[int, int]:
    """Height and width of the predictions that the losses see: those of the images over ``stride``, rounded up."""
    return -(-images.shape[-2] // stride), -(-images.shape[-1] // stride)


@dataclass(frozen=True)
class SmallTargets:
    """Samples the targets of a batch as the losses will (:func:`task_losses`), in the process that loads it.

    The losses are the same to the bit, but full-size labels no longer travel to the training process, which would have
    to give their memory back: at 480x640 with four tasks 65 MB of the 94 MB of eight samples.
    """

    tasks: Mapping[str, Task]
    stride: int

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        size = loss_size(batch["image"], self.stride)
        small = {name: task.resize_target(batch[name], size) for name, task in self.tasks.items() if name in batch}
        return {**batch, **small}


def task_losses(
    output: Any,
    targets: Mapping[str, Tensor],
    tasks: Mapping[str, Task],
    weights: Mapping[str, float],
    balance_weight: float = 0.0,
    z_weight: float = 0.0,
) -> dict[str, Tensor]:
    """The weighted sum under ``loss``, and its parts: ``losses/<task>``, ``balance_loss``, ``z_loss``, and where there
    are auxiliary predictions ``auxiliary_loss``, their weighted sum; all float32.

    Targets larger than the predictions are sampled at their size.
    """
    losses = _losses(output.predictions, targets, tasks)
    balance_loss, z_loss = output.balance_loss.float(), output.z_loss.float()
    loss = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
    loss = loss + balance_weight * balance_loss + z_weight * z_loss
    named = {f"losses/{name}": value for name, value in losses.items()}
    if auxiliary := _losses(getattr(output, "auxiliary", {}), targets, tasks):
        summed = torch.stack([weights[name] * loss for name, loss in auxiliary.items()]).sum()
        named["auxiliary_loss"] = output.auxiliary_weight * summed
        loss = loss + named["auxiliary_loss"]
    return {"loss": loss, **named, "balance_loss": balance_loss, "z_loss": z_loss}


def _losses(
    predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor], tasks: Mapping[str, Task]
) -> dict[str, Tensor]:
    losses = {}
    for name, prediction in predictions.items():
        target = tasks[name].resize_target(targets[name], (prediction.shape[-2], prediction.shape[-1]))
        losses[name] = tasks[name].loss(prediction.float(), target)
    return losses
