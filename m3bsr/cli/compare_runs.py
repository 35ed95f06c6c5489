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
from m3bsr.report.baselines import Baseline, baselines_note, check_baselines, read_baselines, scores_of
from m3bsr.report.compare import SHORT, pareto_charts, points_of
from m3bsr.report.pareto import save_pareto, standalone
from m3bsr.report.rows import (
    COLUMNS,
    as_text,
    better,
    group_runs,
    mean_row,
    qualities,
    quality,
    same_or_complain,
    table_rows,
    write_table,
)
from m3bsr.utils.lookup import lookup
from m3bsr.utils.malloc import keep_freed_memory

Groups = Mapping[str, Sequence[Path]]
Rows = dict[str, dict[str, Any]]


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(
        prog="tools/compare_runs.py",
        description="Finished runs side by side. NAME-s0, NAME-s1 ... are seeds of NAME and share a row.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, in the order of the table")
    parser.add_argument("--out", type=Path, default=Path("runs/compared"), help="folder of the page and the tables")
    parser.add_argument("--reference", help="name that shares and delta_m are against (default: full, else the last)")
    parser.add_argument(
        "--baselines",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="runs that trained one task each: delta_m is against their means over seeds",
    )
    parser.add_argument("--each", action="store_true", help="a row for every folder, also for seeds of one name")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each; 0 takes the times of training")
    parser.add_argument("--pictures", type=int, default=3, help="number of photographs; 0 needs no data")
    parser.add_argument("--root", help="where the data lies now, if it was moved (for the pictures)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of quality against GMACs (png, pdf, svg)")
    parser.add_argument("--title", default="Comparison", help="title of the page")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.out.suffix == ".html":
        raise ValueError(f"--out takes a folder (report.html is written into it), got {args.out}")
    known = {run.resolve() for run in args.baselines}
    runs = [run for run in args.runs if run.resolve() not in known]
    if not runs:
        raise ValueError("nothing to compare: every run is one of --baselines")
    groups = {run.name: [run] for run in runs} if args.each else group_runs(runs)
    rows = write_comparison(
        args.out,
        groups,
        reference=pick_reference(groups, args.reference),
        rounds=args.rounds,
        pictures=args.pictures,
        root=args.root,
        title=args.title,
        baselines=group_runs(args.baselines),
    )
    if args.plot:
        plot(rows, args.plot)
        print(args.plot)
    return 0


def plot(rows: Rows, path: Path) -> None:
    """Quality against the operations of a training step as a picture.

    Raises:
        ValueError: fewer than two rows that have both.
    """
    key, labels = quality(rows), {column.key: column.label for column in COLUMNS}
    points = points_of(rows, "train_step_gmacs")
    labels_of = {"cost": labels["train_step_gmacs"], "quality": labels.get(key, key)}
    save_pareto(points, path, **labels_of, better=better(key))


def pick_reference(groups: Groups, wanted: str | None = None) -> str:
    """The name that all others are compared with: ``full`` where there is one, else the last.

    Raises:
        ValueError: no such name.
    """
    if wanted is not None:
        lookup(groups, wanted, "--reference")
        return wanted
    return "full" if "full" in groups else list(groups)[-1]


def write_comparison(
    out: Path,
    groups: Groups,
    *,
    reference: str,
    rounds: int,
    pictures: int = 3,
    root: str | None = None,
    title: str = "Comparison",
    subtitle: str = "",
    note: str = "",
    first_rows: Rows | None = None,
    baselines: Groups | None = None,
) -> Rows:
    """Print the table; write ``report.html, table.csv, table.json, pareto-*.svg`` into ``out``.

    Args:
        groups: per name its run folders (seeds).
        first_rows: rows above those of the runs, which no run folder stands behind.
        baselines: the same for tasks that were trained alone; they have rows too, and delta_m is against them. Their
            configs and seeds go into ``table.json``.

    Raises:
        FileNotFoundError, ValueError: a folder without a finished run, seeds with other settings; a task without a
            baseline, or one that was scored otherwise.
    """
    baselines = baselines or {}
    if both := [name for name in baselines if name in groups]:
        raise ValueError(f"{both[0]} is the name of a baseline and of other runs; rename one of the folders")
    every = {**baselines, **groups}
    check_finished(every)
    alone = read_baselines(baselines)
    budgets = check_baselines(alone, [run for runs in groups.values() for run in runs])
    rows = {**(first_rows or {}), **compare_rows(every, rounds=rounds, reference=reference, baselines=alone)}
    notes = [baselines_note(alone), *budgets[:1]] if alone else []
    print("\n".join([as_text(rows), *notes]), flush=True)
    shown = {}
    for name, runs in groups.items() if pictures > 0 else ():
        config, model, _ = open_run(runs[0])
        shown[name] = pictures_of(replace(config, {"data.root": root or config.data.root}), model, num=pictures)
    folders = {name: list(map(str, runs)) for name, runs in every.items()}
    against = {"baselines": {column: base.to_dict() for column, base in alone.items()}, "other_budgets": budgets}
    write_table(out, rows, reference=reference, runs=folders, **(against if alone else {}))
    for cost, svg in pareto_charts(rows).items():
        (out / f"pareto-{SHORT[cost].lower()}.svg").write_text(standalone(svg), encoding="utf-8")
    page = compare_report(
        out / "report.html",
        rows,
        folders,
        title=title,
        subtitle=subtitle,
        note=" ".join(filter(None, (note, *notes))),
        collected=shown,
    )
    print(f"open {page}; {out}/table.csv and table.json hold the numbers")
    return rows


def check_finished(groups: Groups) -> None:
    """That every folder holds a finished run, and that seeds differ in nothing else.

    Raises:
        FileNotFoundError, ValueError: the first one that does not.
    """
    for name, runs in groups.items():
        for run in runs:
            if not (run / "result.json").is_file():
                raise FileNotFoundError(f"{run} holds no finished run (no result.json)")
        same_or_complain(name, runs)


def compare_rows(
    groups: Groups, *, rounds: int, reference: str, baselines: Mapping[str, Baseline] | None = None
) -> Rows:
    """A row per name: metrics and costs from the folders of its seeds, the share of the step against ``reference``,
    delta_m against it or against ``baselines``; step times measured now, the first run of each name taking turns
    with the others.

    Raises:
        ValueError: a task without a baseline.
    """
    of_runs = {name: [comparison_row(run) for run in runs] for name, runs in groups.items()}
    rows = table_rows(of_runs, reference, scores_of(baselines, qualities(mean_row(of) for of in of_runs.values())))
    if rounds > 0:
        keep_freed_memory()
        jobs = {name: step_job(*open_run(runs[0])[:2]) for name, runs in groups.items()}
        device = next(iter(jobs.values())).device
        times = time_interleaved(
            {name: job.runner() for name, job in jobs.items()}, repeats=rounds, warmup=1, device=device
        )
        for name, timing in times.items():
            rows[name] |= {"step_ms": timing.median_ms, "step_ratio": paired_ratio(timing, times[reference])}
    return rows
