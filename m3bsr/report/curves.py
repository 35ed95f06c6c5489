"""Curves of a run as inline SVG, which follows the page's colours and stays sharp at any width."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from m3bsr.report.style import COLOURS

Series = Mapping[str, Sequence[tuple[float, float]]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 224, 52, 10, 10, 34


def training_curves(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, Series]]:
    """From the lines of a `log.jsonl`: titles and series `{name: [(step, value), ...]}`, without empty ones.

    Total loss, loss of each task, learning rate, step time, then the metrics of each task over the evaluations.
    """
    train = [r for r in records if r.get("kind") == "train"]
    val = [r for r in records if r.get("kind") == "val"]
    charts: list[tuple[str, Series]] = [("training loss", {"loss": _points(train, "loss")})]
    tasks = list(dict.fromkeys(task for r in train for task in r.get("losses", {})))
    if len(tasks) > 1:
        charts += [(f"training loss: {task}", {task: _points(train, "losses", task)}) for task in tasks]
    scored = list(dict.fromkeys(task for r in val for task in r.get("metrics", {})))
    for task in scored:
        names = list(dict.fromkeys(name for r in val for name in r["metrics"].get(task, {})))
        charts += [(f"{task}: {name}", {name: _points(val, "metrics", task, name)}) for name in names]
    charts += [
        ("load balance loss", {"balance": _points(train, "balance_loss")}),
        ("auxiliary loss", {"auxiliary": _points(train, "auxiliary_loss")}),
        ("gradient norm", {"norm": _points(train, "grad_norm")}),
        ("learning rate", {"lr": _points(train, "lr")}),
        ("step time, ms", {"ms": _points(train, "step_ms")}),
    ]
    return [(title, series) for title, series in charts if any(_varied(points) for points in series.values())]


def _points(records: Sequence[Mapping[str, Any]], *path: str) -> list[tuple[float, float]]:
    points = []
    for record in records:
        value: Any = record
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((float(record["step"]), float(value)))
    return points


def _varied(points: Sequence[tuple[float, float]]) -> bool:
    return any(value != 0 for _, value in points)


def line_chart(series: Series, *, x_label: str = "step", label: str = "") -> str:
    """One chart as SVG; colours are the CSS variables `--c0`, `--c1`... of the page, one a series, empty or not."""
    if not any(series.values()):
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min(ys), max(ys), 4)
    x_range = (min(xs), max(xs)) if max(xs) > min(xs) else (x_ticks[0], x_ticks[-1])
    y_range = (min(y_ticks[0], *ys), max(y_ticks[-1], *ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for tick in y_ticks:
        y = at(x_range[0], tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            x = at(tick, y_range[0])[0]
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{tick_label(tick)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{html.escape(x_label)}</text>')
    for index, (name, points) in enumerate(series.items()):
        colour = f"var(--c{index % COLOURS})"
        places = [at(x, y) for x, y in sorted(points)]
        if not places:
            continue
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" style="stroke:{colour}"><title>{html.escape(name)}</title></polyline>')
        for x, y in places if len(places) <= 25 else places[-1:]:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" style="fill:{colour}"/>')
    aria = html.escape(label or ", ".join(series), quote=True)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{aria}">{"".join(parts)}</svg>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that enclose `low` and `high`."""
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_label(value: float) -> str:
    """Short: 0.25, 1.5k, 3e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 10000:
        return f"{value / 1000:.4g}k"
    if abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"
