"""Several ways of training side by side: a table, quality against cost, curves, pictures of the same photographs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3bsr.engine.log import read_log
from m3bsr.report import html
from m3bsr.report.collect import Collected
from m3bsr.report.curves import Series, training_curves
from m3bsr.report.html import Column, Section
from m3bsr.report.panels import Group, Picture, expert_group, token_group
from m3bsr.report.pareto import Point, front, pareto_chart
from m3bsr.report.routing import load_maps, of_pictures
from m3bsr.report.rows import COLUMNS, DELTA_M, Row, better, columns_of, quality, spread_of_seeds
from m3bsr.report.run import curves

COST_KEYS = {column.key for column in COLUMNS} - {"seeds", DELTA_M}
# Costs that quality is drawn against.
COSTS = ("measured_peak_mb", "step_ms", "train_step_gmacs")
SHORT = {"measured_peak_mb": "memory", "step_ms": "time", "train_step_gmacs": "GMACs"}


def compare_report(
    path: str | Path,
    rows: Mapping[str, Row],
    runs: Mapping[str, str | Path | Sequence[str | Path]] | None = None,
    *,
    title: str = "Comparison",
    subtitle: str = "",
    collected: Mapping[str, Collected] | None = None,
    note: str = "",
) -> Path:
    """Write a page with runs side by side.

    Args:
        rows: per name a row, as from :func:`m3bsr.report.rows.table_rows`; keys beside its own are columns too.
        runs: per name the run folder, or those of its seeds, for the curves (one colour a name, mean over seeds).
        collected: per name what the same photographs showed.
    """
    folders = {n: [Path(f) for f in ([of] if isinstance(of, str | Path) else of)] for n, of in (runs or {}).items()}
    found = {n: [f / "log.jsonl" for f in of if (f / "log.jsonl").is_file()] for n, of in folders.items()}
    logs = {name: [read_log(file) for file in files] for name, files in found.items() if files}
    links = "".join(html.paragraph(f"{name}: {', '.join(map(str, of))}") for name, of in folders.items())
    sections = [
        Section("Table", compare_table(rows), " ".join(filter(None, (note, seeds_note(rows))))),
        Section("Quality against cost", html.figures(pareto_figures(rows)), FRONT_NOTE),
        Section("Curves", (html.legend(list(logs)) + curves(joined_curves(logs))) if logs else ""),
        *compare_pictures(collected or {}),
        Section("Runs", links),
    ]
    return html.write_report(path, title, sections, subtitle)


FRONT_NOTE = (
    "Filled, and in the table by letters: M memory, T time, G GMACs: no other is both as cheap and as good. The "
    "dashed line is the best quality that a cost buys. Whiskers are standard deviations over seeds."
)


def seeds_note(rows: Mapping[str, Row]) -> str:
    """How much seeds alone make out."""
    spread, key = spread_of_seeds(rows), quality(rows)
    if spread is None:
        return ""
    return f"Means over seeds, ± standard deviation. {key}: the median standard deviation is {html.number(spread, 2)}."


def compare_table(rows: Mapping[str, Row]) -> str:
    """The sortable table; the best value of each column is marked."""
    fronts = {cost: {p.name for p in front(points_of(rows, cost), better(quality(rows)))} for cost in COSTS}
    columns, lines = columns_of(rows), []
    for name, row in rows.items():
        on = [SHORT[cost][0].upper() for cost, names in fronts.items() if name in names]
        lines.append({"run": name, **row, "front": " ".join(on)})
    if len(rows) > 1 and any(fronts.values()):
        behind = next((i for i, column in enumerate(columns) if column.key in COST_KEYS), len(columns))
        columns.insert(behind, Column("front", "front (M T G)"))
    return html.table(columns, lines)


def points_of(rows: Mapping[str, Row], cost: str) -> list[Point]:
    """Runs with both a quality and this cost."""
    key = quality(rows)
    return [
        Point(name, float(row[cost]), float(row[key]), getattr(row[key], "spread", 0.0), index)
        for index, (name, row) in enumerate(rows.items())
        if row.get(key) is not None and row.get(cost) is not None
    ]


def pareto_charts(rows: Mapping[str, Row]) -> dict[str, str]:
    """Quality against each cost, as SVG, by the key of the cost."""
    key, labels = quality(rows), {column.key: column.label for column in COLUMNS}
    charts = {
        cost: pareto_chart(points_of(rows, cost), cost=labels[cost], quality=labels.get(key, key), better=better(key))
        for cost in COSTS
    }
    return {cost: svg for cost, svg in charts.items() if svg}


def pareto_figures(rows: Mapping[str, Row]) -> dict[str, str]:
    """The same with titles."""
    labels = {column.key: column.label for column in COLUMNS}
    named = labels.get(quality(rows), quality(rows))
    return {f"{named} against {labels[cost]}": svg for cost, svg in pareto_charts(rows).items()}


def joined_curves(logs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> list[tuple[str, Series]]:
    """The same curve of all names in one chart, mean over seeds; every name keeps its colour, also without points."""
    joined: dict[str, dict[str, Any]] = {}
    for name, seeds in logs.items():
        points: dict[str, list[Sequence[tuple[float, float]]]] = {}
        for records in seeds:
            for title, series in training_curves(records):
                points.setdefault(title, []).append(next(iter(series.values())))
        for title, of_seeds in points.items():
            if max(map(len, of_seeds)) < 2:  # one evaluation is no curve: it stands in the table
                continue
            joined.setdefault(title, {n: () for n in logs})[name] = mean_curve(of_seeds)
    return list(joined.items())


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean at every step that all curves have."""
    by_step: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            by_step.setdefault(step, []).append(value)
    return [(step, statistics.fmean(values)) for step, values in by_step.items() if len(values) == len(curves)]


def answers_table(collected: Mapping[str, Collected]) -> str:
    """What each says about the same photographs, for tasks with one answer an image."""
    rows = []
    for samples in zip(*(c.samples for c in collected.values()), strict=False):
        for task in samples[0].answers:
            said = {name: s.answers.get(task, "") for name, s in zip(collected, samples, strict=True)}
            rows.append(
                {"photo": samples[0].name if len(samples[0].answers) == 1 else f"{samples[0].name}, {task}"} | said
            )
    return html.table([Column("photo", "photo"), *(Column(name, name) for name in collected)], rows)


def compare_pictures(collected: Mapping[str, Collected]) -> list[Section]:
    """Predictions of every run on the same photographs, where each dropped tokens, and what its experts did."""
    groups = []
    photos = [Picture(s.name, s.photo) for c in list(collected.values())[:1] for s in c.samples if not s.predictions]
    if photos:
        groups.append(Group("", tuple(photos)))
    for samples in zip(*(c.samples for c in collected.values()), strict=False):
        first = samples[0]
        if not first.predictions:
            continue
        for task in first.predictions:
            pictures = [Picture("photo", first.photo)]
            if task in first.targets:
                pictures.append(Picture("ground truth", first.targets[task]))
            pictures += [Picture(n, s.predictions[task]) for n, s in zip(collected, samples, strict=True)]
            groups.append(Group(f"{first.name}, {task}", tuple(pictures)))
    dropped = [
        Group(f"{name}: {sample.name}", token_group(sample).pictures)
        for name, runs in collected.items()
        for sample in runs.samples
        if sample.kept
    ]
    experts = [
        Group(f"{name}: {sample.name}", expert_group(sample).pictures)
        for name, runs in collected.items()
        for sample in runs.samples[:1]
        if sample.experts
    ]
    loads = "".join(
        html.details(name, load_maps(of_pictures(runs)), is_open=len(collected) < 3)
        for name, runs in collected.items()
        if runs.load
    )
    return [
        Section("Predictions", html.picture_groups(groups) + answers_table(collected)),
        Section("Tokens kept", html.picture_groups(dropped), "Greyed patches were dropped, as in training."),
        Section("Experts chosen", html.picture_groups(experts, small=True, longest=240), "First choice of each patch."),
        Section("Expert load", loads, "Share of choices in per cent, over the photographs above."),
    ]
