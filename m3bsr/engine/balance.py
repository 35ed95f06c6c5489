"""How much each task's loss counts: as set, or learned from the losses on the way.

``BALANCES[name](weights, epoch_steps, state)`` gives an object with ``weights()`` for the next step, ``note(losses,
step)`` after each step, and ``state``, plain data for checkpoints. The weights that the config sets stay in force as
units: every rule starts from them and works on ``x_t = weight_t * loss_t``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class Balance(ABC):
    """Base: the weights of the config, times a factor per task.

    Args:
        weights: weight per task, as set.
        epoch_steps: optimizer steps in an epoch.
        state: of the run that is resumed; empty at the start.
    """

    def __init__(self, weights: Mapping[str, float], epoch_steps: int, state: Mapping[str, Any] | None = None) -> None:
        self.base, self.epoch_steps = dict(weights), epoch_steps
        self.state: dict[str, Any] = dict(state or {})

    def weights(self) -> dict[str, float]:
        """Weight of each task in the next step."""
        return {task: weight * self.factor(task) for task, weight in self.base.items()}

    @abstractmethod
    def factor(self, task: str) -> float:
        """What the weight of a task is multiplied by."""

    def note(self, losses: Mapping[str, float], step: int) -> None:
        """Take the losses (without weights) of a step that is finished; ``step`` counts from 1.

        Only tasks that the batch had labels for are heard: a loss of exactly zero means that nothing was labelled.
        """
        heard = {task: self.base[task] * loss for task, loss in losses.items() if loss != 0 and self.base[task] != 0}
        self.learn(heard, step)

    @abstractmethod
    def learn(self, weighted: Mapping[str, float], step: int) -> None:
        """Learn from ``weight_t * loss_t``."""


class Fixed(Balance):
    """The weights as they are set."""

    def factor(self, task: str) -> float:
        return 1.0

    def learn(self, weighted: Mapping[str, float], step: int) -> None:
        pass


class Uncertainty(Balance):
    """Homoscedastic uncertainty (Kendall, Gal and Cipolla, CVPR 2018): ``sum_t exp(-s_t) x_t + s_t / 2``.

    The model sees ``exp(-s_t)`` as a weight; ``s_t`` (log of a variance, 0 at first) descends the same objective by its
    own gradient ``1/2 - exp(-s_t) x_t``. That is joint training with a rate of its own for s, so neither the model's
    optimizer nor its weight decay touches it. At rest each task contributes 1/2: a loss that stays large counts less.
    """

    RATE = 0.01
    """About 200 steps to follow a change."""
    MAX_MOVE = 0.1

    def factor(self, task: str) -> float:
        return math.exp(-self.state.get(task, 0.0))

    def learn(self, weighted: Mapping[str, float], step: int) -> None:
        for task, x in weighted.items():
            move = self.RATE * (self.factor(task) * x - 0.5)
            self.state[task] = self.state.get(task, 0.0) + max(-self.MAX_MOVE, min(self.MAX_MOVE, move))


class DynamicWeightAverage(Balance):
    """Dynamic weight average (Liu, Johns and Davison, CVPR 2019): tasks whose loss falls slower than others' gain.

    ``factor_t = T * exp(r_t / 2) / sum_i exp(r_i / 2)`` over T tasks, ``r_t`` the mean loss of the last epoch over that
    of the epoch before; 1 in the first two epochs. Factors sum to T.
    """

    TEMPERATURE = 2.0

    def factor(self, task: str) -> float:
        ratios = {t: self._ratio(t) for t in self.base if self.base[t] != 0 or t == task}
        total = sum(math.exp(r / self.TEMPERATURE) for r in ratios.values())
        return len(ratios) * math.exp(ratios[task] / self.TEMPERATURE) / total

    def _ratio(self, task: str) -> float:
        last, before = self.state.get("last", {}).get(task), self.state.get("before", {}).get(task)
        return last / before if last and before else 1.0

    def learn(self, weighted: Mapping[str, float], step: int) -> None:
        sums = {task: list(pair) for task, pair in self.state.get("sums", {}).items()}
        for task, x in weighted.items():
            total, num = sums.get(task, (0.0, 0))
            sums[task] = [total + x, num + 1]
        self.state = {**self.state, "sums": sums}
        if step % self.epoch_steps == 0:
            means = {task: total / num for task, (total, num) in sums.items()}
            self.state = {"before": self.state.get("last", {}), "last": means, "sums": {}}


BALANCES: dict[str, type[Balance]] = {
    "fixed": Fixed,
    "uncertainty": Uncertainty,
    "dwa": DynamicWeightAverage,
}
