"""Where tokens went: load, entropy, overlap between tasks, dead experts; from counts that are summed over batches.

Load is the share of a task's choices that an expert got: every token makes K of them, so the load of a task sums to 1
and no expert can have more than 1 / K. Shapes: G tasks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m3bsr.moe.routing import Routing

DEAD_SHARE = 0.01
"""An expert is dead when it gets less than this part of an even share, over all tasks."""

BlockCounts = dict[int, dict[tuple[str, ...], Tensor]]
"""Per block, and per tuple of tasks that were run together: counts `[G, E]`; one row where they share one stream."""


class RoutingCounts:
    """Sums of choices, on the device where they were made: adding never waits for it.

    Args:
        counts: a dict to add to, such as one that came out of a checkpoint; used as it is, not copied.
    """

    def __init__(self, counts: BlockCounts | None = None) -> None:
        self.counts: BlockCounts = {} if counts is None else counts

    def add(self, output: Any) -> None:
        """Count one forward pass: `output.routing {block: Routing}` for the tasks in `output.predictions`.

        A model without experts may have no such attribute.
        """
        tasks = tuple(output.predictions)
        routing: Mapping[int, Routing] = getattr(output, "routing", {})
        for block, choices in routing.items():
            new_GE, sums = choices.counts(), self.counts.setdefault(block, {})
            sums[tasks] = new_GE + sums[tasks].to(new_GE.device) if tasks in sums else new_GE

    def per_task(self) -> dict[int, dict[str, Tensor]]:
        """Per block and task int64 `[E]` on the CPU; tasks that share one stream each get all of it. Waits."""
        result: dict[int, dict[str, Tensor]] = {}
        for block in sorted(self.counts):
            by_task = result.setdefault(block, {})
            for tasks, counts_GE in self.counts[block].items():
                rows = counts_GE.cpu().expand(len(tasks), -1)
                for task, row_E in zip(tasks, rows, strict=True):
                    by_task[task] = by_task.get(task, 0) + row_E
        return result


def loads(counts_GE: Tensor) -> Tensor:
    """Counts as shares of each row `[G, E]`, float64; a task without tokens has zeros."""
    return counts_GE.double() / counts_GE.sum(-1, keepdim=True).clamp_min(1)


def load_entropy(loads_GE: Tensor) -> Tensor:
    """Entropy of each row over its maximum, log E: `[G]` in 0..1, 1 when all experts are used alike (or E is 1)."""
    num_experts = loads_GE.shape[-1]
    if num_experts < 2:
        return torch.ones_like(loads_GE[..., 0])
    return torch.special.entr(loads_GE).sum(-1).clamp_min(0) / math.log(num_experts)


def load_overlap(loads_GE: Tensor) -> Tensor:
    """Share of choices that two tasks spend alike, `sum_e min(a_e, b_e)`: `[G, G]`, 0 (no common expert) to 1."""
    return torch.minimum(loads_GE[:, None], loads_GE[None]).sum(-1)


def dead_experts(loads_GE: Tensor) -> tuple[int, ...]:
    """Ids of the experts whose mean load over the tasks is under `DEAD_SHARE / E`."""
    mean_E = loads_GE.mean(0)
    return tuple((mean_E < DEAD_SHARE / mean_E.numel()).nonzero().flatten().tolist())


def routing_stats(counts: Mapping[int, Mapping[str, Tensor | Sequence[int]]]) -> dict[str, dict[str, Any]]:
    """What a log holds of the counts `[E]` per block and task: plain numbers, rounded, keys as JSON has them.

    Returns:
        Per block `load {task: [E shares]}`, `entropy {task: 0..1}`, `overlap {"task+task": 0..1}` for every pair,
        `num_dead` and `dead`, the ids of experts that no task uses.
    """
    stats: dict[str, dict[str, Any]] = {}
    for block, by_task in counts.items():
        tasks = tuple(by_task)
        loads_GE = loads(torch.stack([torch.as_tensor(by_task[task]) for task in tasks]))
        overlap, dead = load_overlap(loads_GE).tolist(), dead_experts(loads_GE)
        pairs = [(i, j) for i in range(len(tasks)) for j in range(i + 1, len(tasks))]
        stats[str(block)] = {
            "load": {task: _rounded(row) for task, row in zip(tasks, loads_GE.tolist(), strict=True)},
            "entropy": dict(zip(tasks, _rounded(load_entropy(loads_GE).tolist()), strict=True)),
            "overlap": {f"{tasks[i]}+{tasks[j]}": round(overlap[i][j], 4) for i, j in pairs},
            "num_dead": len(dead),
            "dead": list(dead),
        }
    return stats


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
