"""The report of a run, from what lies in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3bsr.engine.log import read_log
from m3bsr.methods import METHODS
from m3bsr.report import html
from m3bsr.report.collect import Collected
from m3bsr.report.curves import Series, training_curves
from m3bsr.report.html import Column, Section
from m3bsr.report.panels import expert_group, task_group, token_group
from m3bsr.report.routing import routing_section
from m3bsr.tasks import TASKS
from m3bsr.utils.foreign import read_object

REPORT, COST = "report.html", "cost.json"
MB = 2**20


def run_report(run_dir: str | Path, collected: Collected | None = None, title: str | None = None) -> Path:
    """Write `report.html` into a run folder from its `config.json`, `log.jsonl`, `result.json` and `cost.json`.

    Files that are not there yet leave their sections out; `collected` (see `m3bsr.report.collect`) brings the pictures.

    Raises:
        FileNotFoundError: no such folder, or no `config.json` in it.
        ValueError: a file that is no JSON.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"{run_dir} is no run folder: it has no config.json")
    config = read_json(run_dir / "config.json")
    result, cost = read_json(run_dir / "result.json"), read_json(run_dir / COST)
    records = read_log(run_dir / "log.jsonl") if (run_dir / "log.jsonl").is_file() else []
    sections = [
        Section("Summary", summary(config, result, cost, records)),
        Section("Metrics", metrics_table(result, records), protocol_note(result, records)),
        Section("Curves", curves(training_curves(records))),
        *picture_sections(collected, routing_section(records, collected)),
        Section("Cost", cost_table(cost), cost_note(cost)),
        Section("Config", config_table(config)),
    ]
    return html.write_report(run_dir / REPORT, title or f"Run {run_dir.name}", sections, describe(config))


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_object(path)


def describe(config: Mapping[str, Any]) -> str:
    """One line: backbone, data, tasks, what trains."""
    model, bsr = config.get("model", {}), config.get("bsr", {})
    method = str(model.get("method", "bsr"))
    blocks = bsr.get("train_blocks", "all")
    trains = "all parameters" if blocks == "all" else f"blocks {_listing(blocks)} and the heads"
    if not blocks:
        trains = "the heads"
    drops = bsr.get("drop_blocks")
    if method != "bsr":
        trains, drops = f"by {method}: {getattr(METHODS.get(method.partition(':')[0]), 'what', method)}", ()
    dropping = f", tokens dropped at {_listing(drops)} (keep rate {bsr.get('keep_rate')})" if drops else ""
    return f"{describe_data(config)} Trains {trains}{dropping}."


def describe_data(config: Mapping[str, Any]) -> str:
    """One line: backbone, data, tasks."""
    model, data = config.get("model", {}), config.get("data", {})
    size = " x ".join(map(str, data.get("image_size", ())))
    tasks = ", ".join(data.get("tasks", ()))
    return f"{model.get('backbone', '')} on {data.get('name', '')} at {size}: {tasks}."


def _listing(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list | tuple) else str(values)


def summary(
    config: Mapping[str, Any], result: Mapping[str, Any], cost: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> str:
    """The headline numbers: main metric of each task, step time, memory, parameters."""
    metrics = result.get("metrics") or _last_metrics(records)
    values = {}
    for task, scores in metrics.items():
        main = getattr(TASKS.get(task), "main_metric", next(iter(scores), ""))
        values[f"{task} {main}"] = html.number(scores.get(main))
    steps = result.get("step") or max((r["step"] for r in records), default=None)
    if steps is not None:
        values["steps"] = html.number(steps)
    step_ms = result.get("step_ms", {}).get("median") or cost.get("step_ms")
    if step_ms:
        values["step time"] = f"{html.number(step_ms, 3)} ms"
    if cost.get("measured_peak_bytes"):
        values["peak memory of a step"] = megabytes(cost["measured_peak_bytes"])
    trained = result.get("parameters", {}).get("trained", cost.get("trainable_params"))
    if trained is not None:
        values["trained parameters"] = f"{trained / 1e6:.2f} M"
    if cost.get("train_step_gmacs"):
        values["GMACs a training sample"] = html.number(cost["train_step_gmacs"], 3)
    if result.get("wall_s"):
        values["total time"] = duration(result["wall_s"])
    return html.cards(values) or html.paragraph("This run has not written any result yet.")


def megabytes(count: float) -> str:
    return f"{count / MB:,.0f} MB" if count >= 10 * MB else f"{count / MB:,.1f} MB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _last_metrics(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Mapping[str, float]]:
    return next((r["metrics"] for r in reversed(records) if r.get("kind") == "val"), {})


def metrics_table(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Every metric of every task: at the end, and at the best checkpoint."""
    last = result.get("metrics") or _last_metrics(records)
    best = (result.get("best") or {}).get("metrics") or {}
    rows = [
        {"task": task, "metric": name, "last": value, "best": best.get(task, {}).get(name)}
        for task, scores in last.items()
        for name, value in scores.items()
    ]
    columns = [Column("task", "task"), Column("metric", "metric"), Column("last", "at the end")]
    if best:
        columns.append(Column("best", f"best checkpoint (step {result['best'].get('step')})"))
    return html.table(columns, rows)


def curves(every: Sequence[tuple[str, Series]]) -> str:
    """Losses and the main metric of each task; the other curves behind a click."""
    first = {f"{name}: {task.main_metric}" for name, task in TASKS.items()}
    shown = [(title, series) for title, series in every if title.startswith("training loss") or title in first]
    rest = [pair for pair in every if pair not in shown]
    return html.charts(shown) + (html.details("more curves", html.charts(rest)) if rest else "")


def protocol_note(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    protocol = result.get("protocol") or next((r.get("protocol") for r in reversed(records) if r.get("protocol")), "")
    notes = {
        "network": "Scored against labels at the size of the network's input.",
        "original": "Predictions resized to the size of the original labels before scoring.",
    }
    return notes.get(protocol, "")


def picture_sections(collected: Collected | None, load: Section) -> list[Section]:
    """Predictions, dropped tokens, load and choice of experts."""
    samples = collected.samples if collected is not None else ()
    return [
        Section("Predictions", html.picture_groups([task_group(sample) for sample in samples])),
        Section(
            "Tokens kept",
            html.picture_groups([token_group(sample) for sample in samples]),
            "Greyed patches were dropped, as in training; they come back by the plan's way of restoring.",
        ),
        load,
        Section(
            "Experts chosen",
            html.picture_groups([expert_group(sample) for sample in samples], small=True, longest=240),
            "First choice of each patch in colour; grey where it had been dropped.",
        ),
    ]


def cost_table(cost: Mapping[str, Any]) -> str:
    """The cost report of a step (`m3bsr.cost.CostReport`) as a table, with its modules behind a click."""
    if not cost:
        return ""
    rows = [
        ("trained parameters", html.number(cost["trainable_params"])),
        ("all parameters", html.number(cost["total_params"])),
        ("forward pass, GMACs a sample", html.number(cost["forward_gmacs"])),
        ("training step, GMACs a sample", html.number(cost["train_step_gmacs"])),
        ("stored for the backward pass, a sample", megabytes(cost["saved_bytes_per_sample"])),
        ("optimizer state", megabytes(cost["state_bytes"])),
        ("measured peak of a step", megabytes(cost["measured_peak_bytes"])),
        ("step time, median", f"{html.number(cost['step_ms'], 3)} ms"),
    ]
    plain = html.table(
        [Column("what", "what"), Column("value", "value")], [{"what": a, "value": b} for a, b in rows], sortable=False
    )
    modules = [
        {"module": name or "(attention, scores)", "forward": fwd, "backward": bwd, "sum": fwd + bwd}
        for name, (fwd, bwd) in cost.get("gmacs_by_module", {}).items()
    ]
    columns = [
        Column("module", "module"),
        *(Column(k, f"{k}, GMACs", digits=3) for k in ("forward", "backward", "sum")),
    ]
    return plain + (html.details("GMACs by module", html.table(columns, modules)) if modules else "")


def cost_note(cost: Mapping[str, Any]) -> str:
    if not cost:
        return ""
    return (
        f"Measured with synthetic images, batch {cost.get('batch_size')}, on {cost.get('device')}. The peak is "
        "everything alive at once in a step: parameters, optimizer state, inputs, activations, gradients."
    )


def config_table(config: Mapping[str, Any]) -> str:
    """Every field, behind a click."""
    rows = [
        {"field": f"{section}.{name}", "value": json.dumps(value)}
        for section, fields in config.items()
        if isinstance(fields, Mapping)
        for name, value in fields.items()
    ]
    return html.details("all fields", html.table([Column("field", "field"), Column("value", "value")], rows))
