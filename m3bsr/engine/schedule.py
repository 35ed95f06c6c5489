"""Learning rates over the steps of a run, by timm's schedulers: linear warm-up, then cosine or polynomial decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from m3bsr.utils.lookup import lookup


def _cosine(optimizer: Optimizer, *, poly_power: float, **kwargs: Any) -> Scheduler:
    return CosineLRScheduler(optimizer, **kwargs)


def _poly(optimizer: Optimizer, *, poly_power: float, **kwargs: Any) -> Scheduler:
    return PolyLRScheduler(optimizer, power=poly_power, **kwargs)


SCHEDULES: dict[str, Callable[..., Scheduler]] = {"cosine": _cosine, "poly": _poly}


def make_schedule(
    name: str,
    optimizer: Optimizer,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    poly_power: float = 0.9,
) -> Scheduler:
    """A schedule of ``SCHEDULES``; call ``step_update(n)`` after the n-th step.

    The warm-up is a straight line from ``lr / (warmup_steps + 1)`` in the first step to ``lr`` in step
    ``warmup_steps`` (0-based): no step is wasted on a rate of zero. ``min_lr`` would be reached in step
    ``total_steps``, the first one that is not taken.

    Raises:
        ValueError: unknown name, or a warm-up as long as the run.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"optim.warmup_steps: {warmup_steps} must be less than the {total_steps} steps of this run")
    build = lookup(SCHEDULES, name, "optim.schedule")
    return build(
        optimizer,
        t_initial=total_steps - warmup_steps,
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=min(group["lr"] for group in optimizer.param_groups) / (warmup_steps + 1),
        warmup_prefix=True,
        t_in_epochs=False,
        poly_power=poly_power,
    )
