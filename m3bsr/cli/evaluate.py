"""``tools/evaluate.py RUN``: metrics of a trained run, rebuilt from its checkpoint alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3bsr.build import build_datasets, build_tasks
from m3bsr.cli.common import metrics_table, one_line_errors, open_run, pick_device, write_json
from m3bsr.config import replace
from m3bsr.engine.damaged import KEY, DamagedSamples
from m3bsr.engine.evaluate import evaluate
from m3bsr.engine.loader import eval_loader
from m3bsr.utils.lookup import lookup


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print the metrics and write them into the run folder; exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/evaluate.py", description="Evaluate a trained run.")
    parser.add_argument("run", type=Path, help="run folder, or a checkpoint folder in one")
    parser.add_argument("--checkpoint", default="last", choices=("last", "best", "previous"), help="which one")
    parser.add_argument(
        "--protocol",
        default="network",
        choices=("network", "original"),
        help="score at the size of the network's input, or at the labels' own",
    )
    parser.add_argument("--split", help="another split than the run's data.val_split, such as test")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these; only their path is computed")
    parser.add_argument("--root", help="where the data lies now, if it was moved")
    parser.add_argument("--keep-rate", type=float, help="of the drops, instead of the plan's own in evaluation")
    parser.add_argument("--max-val", type=int, help="only the first so many images")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--num-workers", type=int)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="JSON file to write, in the run folder by default")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    split = (f"-{args.split}" if args.split else "") + (f"-keep{args.keep_rate:g}" if args.keep_rate else "")
    out = args.out or args.run / f"metrics-{args.checkpoint}-{args.protocol}{split}.json"
    report = evaluate_run(
        args.run,
        checkpoint=args.checkpoint,
        protocol=args.protocol,
        tasks=args.tasks,
        device=args.device,
        changes={
            "bsr.eval_keep_rate": args.keep_rate,
            "data.root": args.root,
            "data.val_split": args.split,
            "data.max_val": args.max_val,
            "data.num_workers": args.num_workers,
            "train.eval_batch_size": args.batch_size,
            "train.precision": args.precision,
        },
    )
    write_json(out, report)
    print(f"{report['num_images']} images, labels at {report['protocol']} size, {report['checkpoint']}")
    for line in report["damaged"]:
        print(f"warning: left out: {line}", file=sys.stderr)
    print(metrics_table(report["metrics"]))
    print(out)
    return 0


def evaluate_run(
    run: str | Path,
    *,
    checkpoint: str = "last",
    protocol: str = "network",
    tasks: Sequence[str] | None = None,
    device: str = "auto",
    changes: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Metrics of a run with the way they were measured, as plain data.

    Args:
        tasks: some of the run's tasks, all by default.
        changes: dotted config fields to set otherwise (``data.root`` ...); None leaves a field as it was.

    Raises:
        FileNotFoundError, ValueError: no run, no data, a damaged checkpoint, an unknown task.
    """
    where = pick_device(device)
    changes = {name: value for name, value in (changes or {}).items() if value is not None}
    config, model, folder = open_run(run, checkpoint, {n: v for n, v in changes.items() if n.startswith("bsr.")})
    config = replace(config, changes)
    for task in tasks or ():
        lookup(dict.fromkeys(config.data.tasks), task, f"task of {run}")
    config = replace(config, {"data.tasks": tuple(tasks or config.data.tasks)})
    _, val_set = build_datasets(config, target_size=protocol)
    loader = eval_loader(val_set, batch_size=config.train.eval_batch_size, num_workers=config.data.num_workers)
    metrics = evaluate(model.to(where), build_tasks(config), loader, where, config.train.precision, progress)
    sizes = {"val": len(val_set)}  # type: ignore[arg-type]
    DamagedSamples(sizes, config.data.max_skipped).note("val", {KEY: metrics.damaged})
    return {
        "run": str(run),
        "checkpoint": str(folder),
        "protocol": protocol,
        "precision": config.train.precision,
        "num_images": metrics.num_images,
        "damaged": list(metrics.damaged),
        "metrics": metrics,
    }
