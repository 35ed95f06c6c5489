"""Several runs side by side: a table, their curves in one chart, their pictures of the same photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3bsr.engine.log import read_log
from m3bsr.report import html
from m3bsr.report.collect import Collected
from m3bsr.report.curves import Series, training_curves
from m3bsr.report.html import Column, Section
from m3bsr.report.panels import Group, Picture, expert_group, token_group
from m3bsr.report.routing import load_maps, of_pictures
from m3bsr.report.run import COST, MB, curves, read_json
from m3bsr.tasks import TASKS


def comparison_row(run_dir: str | Path) -> dict[str, Any]:
    """One row of :func:`compare_report` from the files of a run: main metric of each task, costs.

    Keys: `{task} {metric}`, `step_ms, measured_peak_mb, trainable_m, train_step_gmacs, saved_mb, wall_s`.
    """
    run_dir = Path(run_dir)
    result, cost = read_json(run_dir / "result.json"), read_json(run_dir / COST)
    row: dict[str, Any] = {}
    for task, scores in (result.get("metrics") or {}).items():
        main = getattr(TASKS.get(task), "main_metric", next(iter(scores), ""))
        row[f"{task} {main}"] = scores.get(main)
    row["step_ms"] = result.get("step_ms", {}).get("median", cost.get("step_ms"))
    if cost:
        row["measured_peak_mb"] = cost["measured_peak_bytes"] / MB
        row["saved_mb"] = cost["saved_bytes_per_sample"] / MB
        row["train_step_gmacs"] = cost["train_step_gmacs"]
    trained = result.get("parameters", {}).get("trained", cost.get("trainable_params"))
    row["trainable_m"] = None if trained is None else trained / 1e6
    row["wall_s"] = result.get("wall_s")
    return row


COST_COLUMNS = (
    Column("step_ms", "step, ms", "low", 3),
    Column("step_ratio", "step, share", "low", 3),
    Column("measured_peak_mb", "measured peak, MB", "low", 3),
    Column("saved_mb", "stored a sample, MB", "low", 3),
    Column("trainable_m", "trained, M", "low", 3),
    Column("train_step_gmacs", "step, GMACs a sample", "low", 3),
    Column("wall_s", "total time, s", "low", 3),
)


def compare_report(
    path: str | Path,
    rows: Mapping[str, Mapping[str, Any]],
    runs: Mapping[str, str | Path] | None = None,
    *,
    title: str = "Comparison",
    subtitle: str = "",
    collected: Mapping[str, Collected] | None = None,
    note: str = "",
) -> Path:
    """Write a page with runs side by side.

    Args:
        rows: per name of a run its row, as from :func:`comparison_row`; keys beside its own are columns too.
        runs: per name the run folder, for the curves (one colour a run).
        collected: per name what the same photographs showed.
    """
    folders = {name: Path(folder) for name, folder in (runs or {}).items()}
    logs = {n: read_log(folder / "log.jsonl") for n, folder in folders.items() if (folder / "log.jsonl").is_file()}
    links = "".join(html.paragraph(f"{name}: {folder}") for name, folder in folders.items())
    sections = [
        Section("Table", compare_table(rows), note),
        Section("Curves", (html.legend(list(logs)) + curves(joined_curves(logs))) if logs else ""),
        *compare_pictures(collected or {}),
        Section("Runs", links),
    ]
    return html.write_report(path, title, sections, subtitle)


def compare_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The sortable table; the best value of each column is marked."""
    known = {column.key: column for column in COST_COLUMNS}
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    columns = [Column("run", "run")]
    columns += [Column(key, key, _better(key)) for key in keys if key not in known]
    columns += [column for column in COST_COLUMNS if column.key in keys]
    return html.table(columns, [{"run": name, **row} for name, row in rows.items()])


def _better(key: str) -> Any:
    """Whether the main metric of a task (`task metric`) is better high or low; nothing for other columns."""
    task = TASKS.get(key.split(" ")[0])
    return "" if task is None else "high" if task.higher_is_better else "low"


def joined_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, Series]]:
    """The same curve of all runs in one chart; every run keeps its colour, also where it has no points."""
    joined: dict[str, dict[str, Any]] = {}
    for name, records in logs.items():
        for title, series in training_curves(records):
            joined.setdefault(title, {n: () for n in logs})[name] = next(iter(series.values()))
    return list(joined.items())


def compare_pictures(collected: Mapping[str, Collected]) -> list[Section]:
    """Predictions of every run on the same photographs, where each dropped tokens, and what its experts did."""
    groups = []
    for samples in zip(*(c.samples for c in collected.values()), strict=False):
        first = samples[0]
        pictures = [Picture("photo", first.photo)]
        for task in first.predictions:
            if task in first.targets:
                pictures.append(Picture(f"{task}: ground truth", first.targets[task]))
            pictures += [Picture(f"{task}: {n}", s.predictions[task]) for n, s in zip(collected, samples, strict=True)]
        groups.append(Group(first.name, tuple(pictures)))
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
    loads = "".join(f"<h3>{name}</h3>{load_maps(of_pictures(runs))}" for name, runs in collected.items() if runs.load)
    return [
        Section("Predictions", html.picture_groups(groups)),
        Section("Tokens kept", html.picture_groups(dropped), "Greyed patches were dropped."),
        Section("Experts chosen", html.picture_groups(experts, small=True, longest=240), "First choice of each patch."),
        Section("Expert load", loads, "Share of choices in per cent, over the photographs above."),
    ]
