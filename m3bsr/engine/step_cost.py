"""What one training step of a model costs: the step of the loop on one batch, measured by ``m3bsr.cost``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m3bsr.cost import CostReport, measure_step
from m3bsr.engine.losses import loss_size, task_losses
from m3bsr.engine.precision import autocast
from m3bsr.tasks.base import Task


def step_cost(
    model: nn.Module,
    tasks: Mapping[str, Task],
    batch: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    precision: str = "fp32",
    clip_norm: float | None = None,
    loss_weights: Mapping[str, float] | None = None,
    loss_stride: int = 1,
    balance_weight: float = 0.0,
    z_weight: float = 0.0,
    repeats: int = 3,
) -> CostReport:
    """Measure training steps on ``batch``; arguments as in ``engine.train``. The weights of ``model`` change."""
    weights = {name: (loss_weights or {}).get(name, task.default_weight) for name, task in tasks.items()}
    inputs = {name: batch[name].to(device) for name in ("image", *tasks)}

    def loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        with autocast(device, precision):
            output = model(inputs["image"], tasks=tuple(tasks), size=loss_size(inputs["image"], loss_stride))
        return task_losses(output, inputs, tasks, weights, balance_weight, z_weight)["loss"]

    model.to(device).train()
    batch_size = len(inputs["image"])
    return measure_step(model, inputs, loss, optimizer, batch_size=batch_size, clip_norm=clip_norm, repeats=repeats)
