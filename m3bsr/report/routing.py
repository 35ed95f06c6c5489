"""Where tokens went, as heat maps: in the page, and as pictures for TensorBoard.

What comes in are the statistics of `m3bsr.moe.stats.routing_stats`, as a log holds them: per block `load {task: [E]}`,
`entropy {task}`, `overlap {"task+task"}`, `dead [ids]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3bsr.moe.stats import routing_stats
from m3bsr.report import html
from m3bsr.report.collect import Collected
from m3bsr.report.curves import Series
from m3bsr.report.html import Section
from m3bsr.report.panels import heat_picture

NOTE = (
    "Share of a task's choices in per cent (darker: more). Entropy is 100 % when all experts are used alike; overlap "
    "is the share of choices that two tasks spend on the same experts; a dead expert gets less than a hundredth of an "
    "even share."
)


def routing_section(records: Sequence[Mapping[str, Any]], collected: Collected | None) -> Section:
    """Load of the newest evaluation that a log tells of, else of the pictures; and how it came about."""
    stats, source = last_routing(records), "Over the validation set, at the end. "
    if not stats and collected is not None:
        stats, source = of_pictures(collected), f"Over {len(collected.samples)} photographs. "
    curves = entropy_curves(records)
    tasks = list(dict.fromkeys(task for _, series in curves for task in series))
    history = html.details("entropy during training", html.legend(tasks) + html.charts(curves)) if curves else ""
    return Section("Expert load", load_maps(stats) + history, source + NOTE)


def last_routing(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Statistics of the last evaluation, or of the last training line where none was evaluated with experts."""
    for kind in ("val", "train"):
        for record in reversed(records):
            if record.get("kind") == kind and record.get("routing"):
                return record["routing"]
    return {}


def of_pictures(collected: Collected) -> dict[str, dict[str, Any]]:
    """Statistics of the photographs that were collected."""
    return routing_stats(collected.load)


def load_maps(stats: Mapping[str, Any]) -> str:
    """Per MoE block a row per task and a column per expert; with several tasks, also their overlap."""
    parts = []
    for block, found in stats.items():
        entropies = {task: f"{100 * value:.0f} %" for task, value in found["entropy"].items()}
        dead = found.get("dead") or []
        names = f": {', '.join(map(str, dead))}" if dead else ""
        parts.append(f"<h3>block {block}</h3>{html.heat_map(found['load'], entropies, 'entropy')}")
        parts.append(html.paragraph(f"dead experts: {len(dead)}{names}"))
        if len(found["load"]) > 1:
            tasks = list(found["load"])
            matrix = dict(zip(tasks, overlap_matrix(found).tolist(), strict=True))
            parts.append(html.heat_map(matrix, corner="overlap", columns=tasks))
    return "".join(parts)


def overlap_matrix(found: Mapping[str, Any]) -> np.ndarray:
    """Overlap of every two tasks of a block `[G, G]`, 1 on the diagonal."""
    tasks = list(found["load"])
    matrix = np.eye(len(tasks))
    for i, a in enumerate(tasks):
        for j, b in enumerate(tasks[i + 1 :], start=i + 1):
            matrix[i, j] = matrix[j, i] = found["overlap"][f"{a}+{b}"]
    return matrix


def entropy_curves(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, Series]]:
    """Per block the entropy of each task over the training lines."""
    lines = [record for record in records if record.get("kind") == "train" and record.get("routing")]
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in lines:
        for block, found in record["routing"].items():
            for task, value in found["entropy"].items():
                series = curves.setdefault(f"entropy: block {block}", {})
                series.setdefault(task, []).append((float(record["step"]), float(value)))
    return list(curves.items())


def routing_pictures(stats: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """For TensorBoard: `routing/load/block 9` (a row per task, in the order of the tasks) and `routing/overlap/...`."""
    pictures = {}
    for block, found in stats.items():
        pictures[f"routing/load/block {block}"] = heat_picture(np.array(list(found["load"].values())))
        if len(found["load"]) > 1:
            pictures[f"routing/overlap/block {block}"] = heat_picture(overlap_matrix(found), top=1.0)
    return pictures
