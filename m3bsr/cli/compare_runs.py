"""``tools/compare_runs.py RUN RUN ...``: finished runs side by side, their steps timed in turns on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3bsr.cli.common import one_line_errors, open_run
from m3bsr.cli.measure_cost import step_job
from m3bsr.cli.report import pictures_of
from m3bsr.config import replace
from m3bsr.cost import paired_ratio, time_interleaved
from m3bsr.report import compare_report, comparison_row
from m3bsr.report.compare import COST_COLUMNS
from m3bsr.utils.malloc import keep_freed_memory


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/compare_runs.py", description="Finished runs side by side.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; ratios are to the last one")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.html"), help="page to write")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each run; 0 takes the times of training")
    parser.add_argument("--root", help="where the data lies now, if it was moved (for the pictures)")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    runs = {run.name: run for run in args.runs}
    if len(runs) < len(args.runs):
        raise ValueError("two of the run folders have the same name")
    rows = compare_rows(runs, rounds=args.rounds)
    print(as_text(rows, reference=args.runs[-1].name))
    pictures = {}
    for name, run in runs.items():
        config, model, _ = open_run(run)
        pictures[name] = pictures_of(replace(config, {"data.root": args.root or config.data.root}), model, num=3)
    print(f"open {compare_report(args.out, rows, runs, collected=pictures)}")
    return 0


def compare_rows(runs: Mapping[str, Path], *, rounds: int) -> dict[str, dict[str, Any]]:
    """A row per run: metrics and costs from its folder; step times measured now, the runs taking turns.

    Raises:
        FileNotFoundError, ValueError: a folder without a finished run.
    """
    for run in runs.values():
        if not (run / "result.json").is_file():
            raise FileNotFoundError(f"{run} holds no finished run (no result.json)")
    rows = {name: comparison_row(run) for name, run in runs.items()}
    if rounds > 0:
        keep_freed_memory()
        steps = {name: step_job(*open_run(run)[:2]).runner() for name, run in runs.items()}
        times = time_interleaved(steps, repeats=rounds, warmup=1)
        last = times[next(reversed(times))]
        for name, timing in times.items():
            rows[name] |= {"step_ms": timing.median_ms, "step_ratio": paired_ratio(timing, last)}
    return rows


def as_text(rows: Mapping[str, Mapping[str, Any]], reference: str) -> str:
    """The table for the terminal: runs as columns, then each as a share of the reference."""
    labels = {column.key: column.label for column in COST_COLUMNS}
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    others = [name for name in rows if name != reference and rows[name].get("step_ms")]
    header = [*rows, *(f"{name}/{reference}" for name in others)]
    width = max(14, *(len(name) + 2 for name in header))
    lines = [" " * 24 + "".join(f"{name:>{width}}" for name in header)]
    for key in keys:
        values = [row.get(key) for row in rows.values()]
        base = rows[reference].get(key)
        shares = [rows[name][key] / base if base and rows[name].get(key) is not None else None for name in others]
        if key == "step_ratio":
            shares = [None] * len(others)
        cells = "".join(f"{'' if v is None else format(v, '.4g'):>{width}}" for v in values)
        ratios = "".join(f"{'' if v is None else format(v, '.2f'):>{width}}" for v in shares)
        lines.append(f"{labels.get(key, key):<24}{cells}{ratios}")
    return "\n".join(lines)
