"""Bad numbers end a run at once, with all that is needed to find where they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from m3bsr.engine.distributed import gather


class NonFiniteError(ArithmeticError):
    """A loss or a gradient became NaN or infinite. The step was not taken: the weights are those before it."""


def check_finite(
    values: Mapping[str, float],
    trained: Mapping[str, nn.Parameter],
    *,
    step: int,
    files: Sequence[str],
    last_good: Path | None,
    gradients: bool = True,
) -> None:
    """Raise unless every loss, and with ``gradients`` the gradient norm too, is finite.

    Args:
        values: ``loss``, ``losses/<task>``, ``balance_loss``, ``z_loss``, ``grad_norm`` as logged: means over the
            processes.
        trained: parameters by name; their gradients are looked at only when something is wrong.
        step: number of steps finished before this one.

    Raises:
        NonFiniteError: names the task, the step, the images of the batch and the last good checkpoint.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value) and (gradients or name != "grad_norm")]
    if not bad:
        return
    files = [name for names in gather(list(files)) for name in names]  # bad on one process is bad on all
    tasks = [name.removeprefix("losses/") for name in bad if name.startswith("losses/")]
    if tasks:
        what = f"loss of task {', '.join(tasks)} is {values[f'losses/{tasks[0]}']}"
    elif bad == ["grad_norm"]:
        what = f"gradient of {_origin(trained)} is not finite"
    else:
        name = next((name for name in bad if name not in ("loss", "grad_norm")), bad[0])
        what = f"{name.replace('_', ' ')} is {values[name]}"
    where = f"last good checkpoint: {last_good}" if last_good else "no checkpoint was saved yet"
    raise NonFiniteError(f"step {step + 1}: the {what}; images: {', '.join(files)}; {where}")


def _origin(trained: Mapping[str, nn.Parameter]) -> str:
    """Where non-finite gradients come from: a head has gradients of its own task only."""
    bad = [name for name, p in trained.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
    tasks = list(dict.fromkeys(name.split(".")[1] for name in bad if name.startswith("heads.")))
    if tasks:
        return f"task {', '.join(tasks)} (at {bad[-1]})"
    return f"{bad[-1]} (after all heads)" if bad else "the parameters together"
