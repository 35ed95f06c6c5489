"""The numbers of a comparison: a row per run from its folder, runs of one name over their seeds as one row."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3bsr.engine.log import read_log
from m3bsr.metrics.delta_m import delta_m
from m3bsr.report.html import Column, number
from m3bsr.report.run import COST, MB, read_json
from m3bsr.report.spread import Spread
from m3bsr.tasks import TASKS

Row = Mapping[str, Any]
DELTA_M = "delta_m"
BETTER = {task.main_metric: "high" if task.higher_is_better else "low" for task in TASKS.values()}
COLUMNS = (
    Column("seeds", "seeds"),
    Column(DELTA_M, "delta_m, %", "high", 3),
    Column("step_ms", "step, ms", "low", 3),
    Column("step_ratio", "step, share", "low", 3),
    Column("measured_peak_mb", "measured peak, MB", "low", 3),
    Column("saved_mb", "stored a sample, MB", "low", 3),
    Column("trainable_m", "trained, M", "low", 3),
    Column("train_step_gmacs", "step, GMACs a sample", "low", 3),
    Column("wall_s", "total time, s", "low", 3),
)


def comparison_row(run_dir: str | Path) -> dict[str, Any]:
    """The row of one run from the files of its folder: main metric of each task, costs.

    Keys: `{task} {metric}`, `step_ms, measured_peak_mb, trainable_m, train_step_gmacs, saved_mb, wall_s`.
    """
    run_dir = Path(run_dir)
    result, cost = read_json(run_dir / "result.json"), read_json(run_dir / COST)
    row: dict[str, Any] = {}
    for task, scores in (result.get("metrics") or {}).items():
        main = getattr(TASKS.get(task), "main_metric", None) or next((m for m in scores if m in BETTER), "")
        row[f"{task} {main}".strip()] = scores.get(main)
    row["step_ms"] = result.get("step_ms", {}).get("median", cost.get("step_ms"))
    if cost:
        row["measured_peak_mb"] = cost["measured_peak_bytes"] / MB
        row["saved_mb"] = cost["saved_bytes_per_sample"] / MB
        row["train_step_gmacs"] = cost["train_step_gmacs"]
    trained = result.get("parameters", {}).get("trained", cost.get("trainable_params"))
    row["trainable_m"] = None if trained is None else trained / 1e6
    row["wall_s"] = _total_time(run_dir, result)
    return row


def _total_time(run_dir: Path, result: Mapping[str, Any]) -> float | None:
    """Time from start to end; of a run that was interrupted the time of all its steps, without evaluations."""
    steps, timed = result.get("step"), result.get("step_ms", {}).get("num")
    if steps is None or timed in (None, steps) or not (run_dir / "log.jsonl").is_file():
        return result.get("wall_s")
    seconds, before = 0.0, 0
    for line in read_log(run_dir / "log.jsonl"):
        if line.get("kind") == "train":
            seconds += (line["step"] - before) * line["step_ms"] / 1000 / max(1e-9, 1 - line.get("data_wait", 0.0))
            before = line["step"]
    return seconds


def group_runs(runs: Iterable[str | Path]) -> dict[str, list[Path]]:
    """Run folders by name: `NAME-s0`, `NAME-s1` ... are the seeds of `NAME`; any other is a group of its own.

    Raises:
        ValueError: a folder twice, or two that would stand under one name.
    """
    groups: dict[str, dict[str, Path]] = {}
    for run in map(Path, runs):
        seeded = re.fullmatch(r"(.+)-s(\d+)", run.name)
        group, seed = seeded.groups() if seeded else (run.name, "")
        if seed in (known := groups.setdefault(group, {})):
            raise ValueError(
                f"{known[seed]} and {run} would both be {run.name} in the table; rename one of the folders"
            )
        known[seed] = run
    for group, folders in groups.items():
        if "" in folders and len(folders) > 1:
            raise ValueError(f"{folders['']} is no seed of {group}, which {', '.join(map(str, folders.values()))} are")
    return {group: list(folders.values()) for group, folders in groups.items()}


def mean_row(rows: Sequence[Row]) -> dict[str, Any]:
    """One row for several seeds: means with their spread; of one run the row itself."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
    means = {key: Spread.of(known) if known else None for key, known in values.items()}
    return {"seeds": len(rows), **means} if len(rows) > 1 else dict(rows[0])


def better(key: str) -> Any:
    """Whether a column of quality (`task metric`, delta_m) is better high or low; empty for other columns."""
    return "high" if key == DELTA_M else BETTER.get(key.partition(" ")[2], "")


def qualities(rows: Iterable[Row]) -> list[str]:
    """The columns that hold the main metric of a task."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if key != DELTA_M and better(key)]


def table_rows(
    groups: Mapping[str, Sequence[Row]], reference: str, baselines: Mapping[str, float] | None = None
) -> dict[str, dict[str, Any]]:
    """A row per group: mean over seeds, and delta_m in per cent against ``baselines`` (a score for each column of
    quality), or without them against the mean of ``reference``; none for a group that lacks a task.

    The spread of delta_m is that of its seeds around the fixed mean of what it is against.
    """
    rows = {name: mean_row(of) for name, of in groups.items()}
    metrics = qualities(rows.values())
    base: dict[str, Any] = {key: (baselines or rows.get(reference, {})).get(key) for key in metrics}
    if metrics and all(base.values()):
        higher = {key: better(key) == "high" for key in metrics}
        for name, of in groups.items():
            whole = [row for row in of if all(row.get(key) is not None for key in metrics)]
            gains = [100 * delta_m({key: row[key] for key in metrics}, base, higher) for row in whole]
            rows[name] = _after_quality(rows[name], metrics, Spread.of(gains) if gains else None)
    return rows


def _after_quality(row: Row, metrics: Sequence[str], gain: float | None) -> dict[str, Any]:
    scores = {key: row.get(key) for key in metrics}
    rest = {key: value for key, value in row.items() if key not in scores and key != "seeds"}
    return {**({"seeds": row["seeds"]} if "seeds" in row else {}), **scores, DELTA_M: gain, **rest}


def quality(rows: Mapping[str, Row]) -> str:
    """The column that stands for quality: the metric where there is one task, delta_m where there are several."""
    metrics = qualities(rows.values())
    return metrics[0] if len(metrics) == 1 else DELTA_M


def columns_of(rows: Mapping[str, Row]) -> list[Column]:
    """Columns of the table: name, seeds, quality, costs; only those that some row has."""
    known = {column.key: column for column in COLUMNS}
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    own = [Column(key, key, better(key)) for key in keys if key not in known]
    shown = [column for column in COLUMNS if column.key in keys]
    return [
        Column("run", "run"),
        *(c for c in shown if c.key == "seeds"),
        *own,
        *(c for c in shown if c.key != "seeds"),
    ]


def as_text(rows: Mapping[str, Row]) -> str:
    """The table for the terminal."""
    columns = columns_of(rows)
    lines = [[column.label for column in columns]]
    lines += [[name, *(_cell(row.get(column.key)) for column in columns[1:])] for name, row in rows.items()]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Spread) and value.spread:
        return f"{number(float(value))} ± {value.spread:.2g}"
    return number(float(value)) if isinstance(value, float) else str(value)


def write_table(folder: Path, rows: Mapping[str, Row], **more: Any) -> list[Path]:
    """Write `table.csv` (spreads in columns of their own) and `table.json` (with `more` beside the rows)."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = [column.key for column in columns_of(rows)[1:]]
    spread = [key for key in keys if any(isinstance(row.get(key), Spread) for row in rows.values())]
    header = ["run", *(name for key in keys for name in ((key, f"{key} std") if key in spread else (key,)))]
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        for name, row in rows.items():
            stds = {f"{key} std": getattr(row.get(key), "spread", None) for key in spread}
            writer.writerow({"run": name, **{key: row.get(key) for key in keys}, **stds})
    data = {name: {key: _plain(value) for key, value in row.items()} for name, row in rows.items()}
    (folder / "table.json").write_text(json.dumps({"rows": data, **more}, indent=2) + "\n")
    return [folder / "table.csv", folder / "table.json"]


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return {"mean": float(value), "std": value.spread, "values": list(value.values)}
    return value


# What has no effect where nothing is dropped.
OF_DROPS = (
    *("bsr.keep_rate", "bsr.select", "bsr.drop_from", "bsr.fuse", "bsr.proportional", "bsr.score_source"),
    *("bsr.schedule", "bsr.schedule_steps", "bsr.restore", "bsr.restore_before", "bsr.eval_keep_rate"),
)


def _settings(folder: Path) -> dict[str, Any]:
    """``section.field`` of a run's config, without those of experts or drops that it has not."""
    sections = {name: fields for name, fields in read_json(folder / "config.json").items() if name != "run"}
    settings = {f"{name}.{key}": value for name, fields in sections.items() for key, value in fields.items()}
    idle = set(OF_DROPS) if settings.get("bsr.drop_blocks") == [] else set()
    if settings.get("moe.blocks") == []:
        idle |= {key for key in settings if key.startswith("moe.") and key != "moe.blocks"}
    return {key: value for key, value in settings.items() if key not in idle}


def same_or_complain(group: str, folders: Sequence[Path]) -> None:
    """Seeds of one name must differ in their seed alone.

    Raises:
        ValueError: two of them have other settings (names the first field).
    """
    first = _settings(folders[0])
    for folder in folders[1:]:
        other = _settings(folder)
        changed = [key for key in first if key in other and first[key] != other[key] and key != "bsr.train_experts"]
        if changed:
            raise ValueError(
                f"{folder} is no seed of {group}: its {changed[0]} is {other[changed[0]]!r}, that of {folders[0]} is "
                f"{first[changed[0]]!r}; rename it"
            )


def spread_of_seeds(rows: Mapping[str, Row]) -> float | None:
    """Median standard deviation of the quality over the groups with seeds: below it a difference says nothing."""
    key = quality(rows)
    known = [row[key].spread for row in rows.values() if isinstance(row.get(key), Spread) and len(row[key].values) > 1]
    return statistics.median(known) if known else None
