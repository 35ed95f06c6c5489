"""What one training step of a model will cost: the step of the loop, predicted by ``m3bsr.cost.predict_step``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from m3bsr.backbones import BackboneOutput
from m3bsr.bsr.attention import use_explicit_attention
from m3bsr.cost import Precision, Prediction, predict_step
from m3bsr.engine.precision import PRECISIONS
from m3bsr.engine.step_cost import StepJob
from m3bsr.heads import DenseHead
from m3bsr.plan import Plan


def predict(job: StepJob, plan: Plan | None = None) -> Prediction:
    """Predict the step of ``job`` without running it; its model may be on the meta device.

    Args:
        plan: instead of the one that the model has.

    Raises:
        ValueError: a block without a formula, or a plan that does not fit the model.
    """
    backbone: Any = job.model.get_submodule("backbone")
    plan = backbone.plan if plan is None else plan
    dense = any(task.dense for task in job.tasks.values())
    images = job.batch["image"]
    shapes = {name: (job.batch[name].shape, job.batch[name].dtype) for name in ("image", *job.tasks)}
    grid = backbone.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    inputs: dict[str, Tensor] = {}

    levels = levels_read(job.model, job.tasks)

    def streams(x_BND: Tensor) -> Sequence[Tensor]:
        """Of each task, from the stack of all or from what they share."""
        return x_BND.chunk(len(job.tasks)) if len(x_BND) > len(images) else [x_BND] * len(job.tasks)

    def behind(twin: Any, x_BND: Tensor, *earlier: Tensor) -> Tensor:
        if not inputs:
            inputs.update(
                {n: torch.empty(shape, dtype=dtype, device=x_BND.device) for n, (shape, dtype) in shapes.items()}
            )
        zero = x_BND.new_zeros(())
        read: dict[str, dict[int, Tensor]] = {task: {} for task in job.tasks}
        for block, level in (*zip(levels, earlier, strict=True), (len(backbone.blocks) - 1, x_BND)):
            for task, stream in zip(job.tasks, streams(level), strict=True):
                read[task][block] = stream
        features = dict(zip(job.tasks, streams(x_BND), strict=True))
        output = BackboneOutput(features, grid, {}, {}, zero, zero, read)
        twin.backbone.forward_tasks = lambda *args, **options: output
        return job.loss(twin, inputs)

    prediction = predict_step(
        job.model,
        plan,
        len(images),
        image_size=(images.shape[-2], images.shape[-1]),
        behind=behind,
        input_bytes=sum(job.batch[name].nbytes for name in shapes),
        optimizer=kind_of(job.optimizer),
        precision=precision_of(job.device, job.precision),
        restored=dense,
        num_tasks=len(job.tasks),
        levels=levels,
    )
    return replace(prediction, averaged=job.ema_decay > 0)


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """Its name in ``m3bsr.cost.predict.OPTIMIZER_COPIES``."""
    name = "sgd" if isinstance(optimizer, torch.optim.SGD) else "adamw"
    return f"fused {name}" if optimizer.defaults.get("fused") else name


def levels_read(model: nn.Module, tasks: Collection[str]) -> tuple[int, ...]:
    """The blocks before the last one that heads of several levels read for ``tasks``."""
    heads: Any = model.get_submodule("heads")
    read = {block for task in tasks if isinstance(heads[task], DenseHead) for block in heads[task].reads[:-1]}
    return tuple(sorted(read))


def precision_of(device: torch.device, precision: str) -> Precision:
    """What autocast means for the formulas: 16 bits, and up to how many tokens attention is written out."""
    dtype = PRECISIONS[precision]
    if dtype is None:
        return Precision(device=device.type)
    tokens = [n for n in range(64, 4097, 64) if use_explicit_attention(device, dtype, n, needs_grad=True)]
    return Precision(True, max(tokens, default=0), device.type)
