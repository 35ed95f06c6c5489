"""Tasks that pull the shared weights different ways: one gradient per task, made into one by a rule of TorchJD.

``CONFLICTS[name](torchjd.aggregation, T)`` gives the rule for T tasks, a function of the matrix ``[T, P]`` of gradients
of the P shared trained parameters; each row is that of ``weight_t * loss_t``, averaged over the micro-batches of the
step (and over processes) *before* the rule sees it. A parameter with the name of a task in its path (its head, its
gates) is not shared: it gets the plain gradient as always, and so does every parameter from auxiliary losses (of
experts, of cross-task refinement), which are no tasks. Frozen ones take no part.

The price: T backward passes instead of one, and ``4 T P`` bytes for the matrix (some rules need a copy while they
decide). Rules keep nothing from step to step, so a resumed run takes the same steps; those of the literature that do
(GradVac, ExcessMTL ...) are left out.

Shapes: T tasks, P shared trained parameters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3bsr.engine.rng import isolated_rng
from m3bsr.utils.lookup import lookup

Rule = Callable[[Tensor], Tensor]

CONFLICTS: dict[str, Callable[[Any, int], Rule]] = {
    "sum": lambda a, n: a.Sum(),  # what training does without a rule
    "mean": lambda a, n: a.Mean(),
    "pcgrad": lambda a, n: a.PCGrad(),  # Yu et al. 2020
    "cagrad": lambda a, n: a.CAGrad(c=0.4),  # Liu et al. 2021, c as in its NYUv2 experiments
    "nash_mtl": lambda a, n: a.NashMTL(n_tasks=n),  # Navon et al. 2022
    "upgrad": lambda a, n: a.UPGrad(),  # Quinton and Rey 2024
    "mgda": lambda a, n: a.MGDA(),  # Desideri 2012, Sener and Koltun 2018
    "imtl_g": lambda a, n: a.IMTLG(),  # Liu et al. 2021
    "aligned_mtl": lambda a, n: a.AlignedMTL(),  # Senushkin et al. 2023
    "config": lambda a, n: a.ConFIG(),  # Liu et al. 2024
    "dualproj": lambda a, n: a.DualProj(),  # Lopez-Paz and Ranzato 2017
    "graddrop": lambda a, n: a.GradDrop(),  # Chen et al. 2020
    "fairgrad": lambda a, n: a.FairGrad(alpha=2.0),  # Ban and Ji 2024, alpha as in its NYUv2 experiments
    "random": lambda a, n: a.Random(),  # Lin et al. 2021
}


class Gradients:
    """The gradient of the whole loss: ``add`` for each micro-batch, ``finish`` before the step."""

    def __init__(self, scaler: torch.amp.GradScaler, accumulate: int) -> None:
        self.scaler, self.accumulate = scaler, accumulate

    def add(self, parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Backward pass of what ``engine.losses.task_losses`` gave."""
        self.scaler.scale(parts["loss"] / self.accumulate).backward()

    def finish(self) -> None:
        """All gradients of the step lie in ``.grad``."""


class TaskGradients(Gradients):
    """The same with a rule of ``CONFLICTS`` for the shared parameters.

    Args:
        name: of the rule.
        trained: parameters by name.
        aux_weights: weight of each auxiliary loss (``balance_loss``, ``z_loss``, ``auxiliary_loss``).

    Raises:
        ValueError: an unknown rule, or TorchJD or a solver of the rule is not installed.
    """

    def __init__(
        self,
        name: str,
        trained: Mapping[str, nn.Parameter],
        tasks: Mapping[str, Any],
        scaler: torch.amp.GradScaler,
        accumulate: int,
        aux_weights: Mapping[str, float],
    ) -> None:
        super().__init__(scaler, accumulate)
        self.tasks, self.aux_weights = tuple(tasks), aux_weights
        make = lookup(CONFLICTS, name, "loss.conflict")
        rules = _torchjd()
        self.rule: Callable[[int], Rule] = lambda num: make(rules, num)
        _try(name, self.rule)
        is_own = {path: not set(self.tasks).isdisjoint(path.split(".")) for path in trained}
        self.own = [p for path, p in trained.items() if is_own[path]]
        self.shared = [p for path, p in trained.items() if not is_own[path]]
        self.rows_TP: Tensor | None = None

    def add(self, parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        every = [*self.shared, *self.own]
        aux = torch.stack([weight * parts[name] for name, weight in self.aux_weights.items() if name in parts]).sum()
        if aux.requires_grad:
            _accumulate(every, self._grad(aux, every))
        for index, task in enumerate(self.tasks):
            if (loss := parts.get(f"losses/{task}")) is None:
                continue
            gradients = self._grad(weights[task] * loss, every)
            _accumulate(self.own, gradients[len(self.shared) :])
            for part, gradient in zip(self._row(index), gradients, strict=False):
                if gradient is not None:
                    part += gradient.flatten()

    def finish(self) -> None:
        if not self.shared or self.rows_TP is None:
            return
        rows_TP, self.rows_TP = self.rows_TP, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(rows_TP)
            rows_TP /= dist.get_world_size()
        # A task without labels in this step has no say; of one row there is nothing to decide.
        heard = rows_TP.any(dim=1)
        rows_TP = rows_TP if bool(heard.all()) else rows_TP[heard]
        # Infinities go on to those who look for them: the loss scaler, or the end of the run.
        decide = len(rows_TP) > 1 and bool(rows_TP.isfinite().all())
        gradient = self.rule(len(rows_TP))(rows_TP) if decide else rows_TP.sum(dim=0)
        parts = gradient.split([p.numel() for p in self.shared])
        _accumulate(self.shared, [part.view_as(p) for part, p in zip(parts, self.shared, strict=True)])

    def _row(self, index: int) -> tuple[Tensor, ...]:
        """The gradient of a task so far, a view for each shared parameter."""
        sizes = [p.numel() for p in self.shared]
        if self.rows_TP is None and self.shared:
            self.rows_TP = self.shared[0].new_zeros(len(self.tasks), sum(sizes))
        return () if self.rows_TP is None else self.rows_TP[index].split(sizes)

    def _grad(self, loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
        scaled = self.scaler.scale(loss / self.accumulate)
        return torch.autograd.grad(scaled, parameters, retain_graph=True, allow_unused=True)


def make_gradients(
    conflict: str,
    trained: Mapping[str, nn.Parameter],
    tasks: Mapping[str, Any],
    scaler: torch.amp.GradScaler,
    accumulate: int,
    aux_weights: Mapping[str, float],
) -> Gradients:
    """How a step gets its gradients: with a rule for conflicts, or for ``"none"`` and for a single task plainly."""
    if conflict == "none" or len(tasks) == 1:
        return Gradients(scaler, accumulate)
    return TaskGradients(conflict, trained, tasks, scaler, accumulate, aux_weights)


def _accumulate(parameters: list[nn.Parameter], gradients: Any) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _torchjd() -> ModuleType:
    try:
        return importlib.import_module("torchjd.aggregation")
    except ImportError as error:
        raise ValueError(f"loss.conflict needs TorchJD: pip install 'm3bsr[mtl]' ({error})") from None


def _try(name: str, rule: Callable[[int], Rule]) -> None:
    """Missing solvers are found before the training, not in its first step."""
    try:
        with isolated_rng(0):  # some rules draw numbers, and training must not depend on this trial
            rule(2)(torch.eye(2))
    except (ImportError, NameError) as error:
        raise ValueError(f"loss.conflict {name} needs more packages: pip install 'm3bsr[mtl]' ({error})") from None
