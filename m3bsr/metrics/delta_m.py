"""The relative multi-task gain over single-task baselines."""

from __future__ import annotations

from collections.abc import Mapping


def relative_gains(
    scores: Mapping[str, float], baselines: Mapping[str, float], higher_is_better: Mapping[str, bool]
) -> dict[str, float]:
    """``(M_i - S_i) / S_i`` for each task in ``baselines``, with the sign turned so that positive is better.

    ValueError names a task that lacks a score or a direction, or a baseline of zero.
    """
    gains = {}
    for task, baseline in baselines.items():
        if task not in scores or task not in higher_is_better:
            raise ValueError(f"delta_m: no score or direction for task '{task}'; scores are for {sorted(scores)}")
        if baseline == 0:
            raise ValueError(f"delta_m: the baseline of task '{task}' is 0, so a relative gain has no meaning")
        sign = 1.0 if higher_is_better[task] else -1.0
        gains[task] = sign * (scores[task] - baseline) / baseline
    return gains


def delta_m(scores: Mapping[str, float], baselines: Mapping[str, float], higher_is_better: Mapping[str, bool]) -> float:
    """Mean relative gain over tasks, ``1/T sum_i (-1)^(lower is better) (M_i - S_i) / S_i``, as a fraction.

    Maninis et al. 2019 (ASTMT). ``scores`` and ``baselines`` map a task to its main metric; baselines come from
    single-task runs of this toolkit, never from a table in a paper.
    """
    gains = relative_gains(scores, baselines, higher_is_better)
    if not gains:
        raise ValueError("delta_m: no baselines given; train each task alone first")
    return sum(gains.values()) / len(gains)
