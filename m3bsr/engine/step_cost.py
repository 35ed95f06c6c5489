"""What one training step of a model costs: the step of the loop on one batch, measured by ``m3bsr.cost``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from m3bsr.cost import CostReport, measure_step, step_peak
from m3bsr.engine.ema import Ema
from m3bsr.engine.losses import loss_size, task_losses
from m3bsr.engine.precision import autocast
from m3bsr.tasks.base import Task


@dataclass(frozen=True)
class StepJob:
    """A training step that can be repeated; settings as in ``engine.train``. Running it changes the weights."""

    model: nn.Module
    tasks: Mapping[str, Task]
    batch: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str = "fp32"
    clip_norm: float | None = None
    loss_weights: Mapping[str, float] | None = None
    loss_stride: int = 1
    balance_weight: float = 0.0
    z_weight: float = 0.0
    ema_decay: float = 0.0

    def inputs(self) -> dict[str, Tensor]:
        return {name: self.batch[name].to(self.device) for name in ("image", *self.tasks)}

    def loss(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        weights = {name: (self.loss_weights or {}).get(name, task.default_weight) for name, task in self.tasks.items()}
        with autocast(self.device, self.precision):
            output = model(inputs["image"], tasks=tuple(self.tasks), size=loss_size(inputs["image"], self.loss_stride))
        return task_losses(output, inputs, self.tasks, weights, self.balance_weight, self.z_weight)["loss"]

    def runner(self) -> Callable[[], None]:
        """A function that does one step, for timing several jobs in turns."""
        self.model.to(self.device).train()
        return self._step(self.inputs(), self._ema())

    def _ema(self) -> Ema | None:
        return Ema(self.model, self.ema_decay) if self.ema_decay else None

    def _step(self, inputs: Mapping[str, Tensor], ema: Ema | None) -> Callable[[], None]:
        trained = [p for p in self.model.parameters() if p.requires_grad]

        def step() -> None:
            self.loss(self.model, inputs).backward()
            if self.clip_norm:
                nn.utils.clip_grad_norm_(trained, self.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update()

        return step

    def measure(self, repeats: int = 3) -> CostReport:
        """All costs of the step."""
        self.model.to(self.device).train()
        inputs: Any = self.inputs()
        report = measure_step(
            self.model,
            inputs,
            self.loss,
            self.optimizer,
            batch_size=len(inputs["image"]),
            clip_norm=self.clip_norm,
            repeats=repeats,
        )
        return replace(report, measured_peak_bytes=self.measured_peak()) if self.ema_decay else report

    def measured_peak(self) -> int:
        """The peak alone, in bytes: two steps instead of the many that :meth:`measure` takes."""
        self.model.to(self.device).train()
        inputs, ema = self.inputs(), self._ema()
        step = self._step(inputs, ema)
        step()
        return step_peak(step, self.model, self.optimizer, [inputs, ema.average if ema is not None else {}])
