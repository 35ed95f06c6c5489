"""Quality against cost: which runs are on the front, and the chart of it as inline SVG or as a picture."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m3bsr.report.curves import BOTTOM, LEFT, TOP, WIDTH, tick_label, ticks
from m3bsr.report.html import number
from m3bsr.report.labels import Box, place_labels
from m3bsr.report.style import COLOURS, STYLE

HEIGHT, RIGHT = 300, 20
LINE = 11
"""Height of a label, in units of the chart."""


class Point(NamedTuple):
    """One run: its cost, its quality, and how far the seeds lie apart."""

    name: str
    cost: float
    quality: float
    spread: float = 0.0
    colour: int = 0


def front(points: Sequence[Point], better: str = "high") -> list[Point]:
    """The points that no other beats: none is as cheap and as good, and cheaper or better. Cheapest first."""
    sign = 1 if better == "high" else -1

    def beats(a: Point, b: Point) -> bool:
        ours, theirs = (a.cost, -sign * a.quality), (b.cost, -sign * b.quality)
        return ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1]

    left = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(left, key=lambda point: (point.cost, point.quality))


def pareto_chart(points: Sequence[Point], *, cost: str, quality: str, better: str = "high") -> str:
    """Cost to the right, better upwards, seeds as whiskers, the front as steps.

    Points on the front are filled, the others are rings; empty for fewer than two points.
    """
    if len(points) < 2:
        return ""
    best = front(points, better)
    ys = [y for p in points for y in (p.quality - p.spread, p.quality + p.spread)]
    x_ticks, y_ticks = ticks(0, max(p.cost for p in points) * 1.04, 5), ticks(min(ys), max(ys), 5)
    height = HEIGHT - TOP - BOTTOM

    def at(cost: float, quality: float) -> tuple[float, float]:
        part = (quality - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        y = TOP + height * (1 - part if better == "high" else part)
        return LEFT + cost / x_ticks[-1] * (WIDTH - LEFT - RIGHT), y

    parts = []
    for tick in y_ticks:
        y = at(0, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    for tick in x_ticks:
        x = at(tick, y_ticks[0])[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{tick_label(tick)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{html.escape(cost)}</text>')
    corners = _corners([at(p.cost, p.quality) for p in best], WIDTH - RIGHT)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    parts.append(f'<polyline points="{line}" style="stroke:var(--soft);stroke-dasharray:4 3;stroke-width:1.2"/>')
    for p in points:
        (x, y), colour = at(p.cost, p.quality), f"var(--c{p.colour % COLOURS})"
        if p.spread:
            ends = sorted(at(p.cost, value)[1] for value in (p.quality - p.spread, p.quality + p.spread))
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" style="stroke:{colour}"/>'
            )
        fill = colour if p in best else "var(--card)"
        said = f"{p.name}: {number(p.quality)}, {number(p.cost, 3)}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" style="fill:{fill};stroke:{colour};stroke-width:2">'
            f"<title>{html.escape(said)}</title></circle>"
        )
    parts += _labels([(p.name, *at(p.cost, p.quality)) for p in points], _lines(corners))
    aria = html.escape(f"{quality} against {cost}", quote=True)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{aria}">{"".join(parts)}</svg>'


def save_pareto(points: Sequence[Point], path: str | Path, *, cost: str, quality: str, better: str = "high") -> None:
    """Write the same chart as a picture (PNG, PDF or SVG by the name's ending).

    Raises:
        ValueError: fewer than two points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if len(points) < 2:
        raise ValueError(f"a chart of {quality} against {cost} needs two runs that have both, got {len(points)}")
    best = front(points, better)
    figure = Figure(figsize=(7.5, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    end = 1.25 * max(p.cost for p in points)
    corners = _corners([(p.cost, p.quality) for p in best], end)
    axis.plot(*zip(*corners, strict=True), color="0.6", linestyle="--", linewidth=1)
    for p in points:
        colour = f"C{p.colour % 10}"
        axis.errorbar(p.cost, p.quality, yerr=p.spread or None, color=colour, linewidth=1.2, capsize=3)
        axis.plot(p.cost, p.quality, "o", color=colour, markerfacecolor=colour if p in best else "white", markersize=7)
    axis.set_xlim(0, end)
    if better == "low":
        axis.invert_yaxis()
    axis.set_xlabel(cost)
    axis.set_ylabel(quality)
    axis.grid(color="0.9")
    _annotate(figure, axis, points, corners)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _annotate(figure: Any, axis: Any, points: Sequence[Point], corners: Sequence[tuple[float, float]]) -> None:
    """Names beside the points of a picture; places are those of the finished layout, in pixels, y downwards."""
    figure.draw_without_rendering()
    canvas, frame, line = figure.bbox.height, axis.bbox, figure.dpi * 10 / 72
    flipped = [(x, canvas - y) for x, y in axis.transData.transform([*((p.cost, p.quality) for p in points), *corners])]
    places, avoid = flipped[: len(points)], _lines(flipped[len(points) :])
    inside = Box(frame.x0, canvas - frame.y1, frame.x1, canvas - frame.y0)
    widths = [0.5 * line * len(p.name) for p in points]
    boxes = place_labels(places, widths, height=line, radius=0.45 * line, inside=inside, avoid=avoid)
    for p, box in zip(points, boxes, strict=True):
        spot = axis.transData.inverted().transform((box.left, canvas - box.bottom))
        axis.text(*spot, p.name, fontsize=8, verticalalignment="bottom")


def standalone(svg: str) -> str:
    """A chart of a page as a file of its own, with the page's colours."""
    style = f"<style>{STYLE} svg.chart {{ background: var(--card); font-family: sans-serif; }}</style>"
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{style}", 1)


def _corners(places: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """The front: a run's quality can be had from its cost upwards, to the ``end`` of the chart."""
    corners = [places[0]]
    for x, y in places[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    return [*corners, (end, corners[-1][1])]


def _lines(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """What the front covers."""
    pairs = zip(corners, corners[1:], strict=False)
    return [Box(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in pairs]


def _labels(places: Sequence[tuple[str, float, float]], avoid: Sequence[Box]) -> list[str]:
    """Names beside their points, over no point, no other name and not over the front."""
    inside = Box(LEFT, 0, WIDTH - 4, HEIGHT - BOTTOM)
    points, widths = [(x, y) for _, x, y in places], [5.8 * len(name) for name, _, _ in places]
    boxes = place_labels(points, widths, height=LINE, radius=4.5, inside=inside, avoid=avoid)
    return [
        f'<text x="{box.left:.1f}" y="{box.bottom - 2:.1f}">{html.escape(name)}</text>'
        for (name, _, _), box in zip(places, boxes, strict=True)
    ]
