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
from m3bsr.data.dense import parse_target_size
from m3bsr.engine.damaged import KEY, DamagedSamples
from m3bsr.engine.distributed import is_main, num_processes, processes
from m3bsr.engine.evaluate import evaluate
from m3bsr.engine.loader import eval_loader
from m3bsr.engine.predictions import PredictionWriter
from m3bsr.utils.lookup import lookup

PROTOCOLS = (
    "network: labels at the size of the network's input; original: labels at their own size, predictions resized "
    "bilinearly; resized:HxW: both at that size, labels by nearest pixel"
)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print the metrics and write them into the run folder; exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/evaluate.py", description="Evaluate a trained run.")
    parser.add_argument("run", type=Path, help="run folder, or a checkpoint folder in one")
    parser.add_argument("--checkpoint", default="last", choices=("last", "best", "previous"), help="which one")
    parser.add_argument("--protocol", default="network", help=PROTOCOLS)
    parser.add_argument("--split", help="another split than the run's data.val_split, such as test")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these; only their path is computed")
    parser.add_argument("--flip", action="store_true", help="average with the predictions for the mirrored images")
    parser.add_argument(
        "--save-predictions", type=Path, metavar="DIR", help="also save them, for tools/score.py and other scripts"
    )
    parser.add_argument("--root", help="where the data lies now, if it was moved")
    parser.add_argument("--keep-rate", type=float, help="of the drops, instead of the plan's own in evaluation")
    parser.add_argument("--max-val", type=int, help="only the first so many images")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--num-workers", type=int, help="processes that load, and as many that score edges")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="JSON file to write, in the run folder by default")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    out = args.out or args.run / report_name(args)
    report = evaluate_run(
        args.run,
        checkpoint=args.checkpoint,
        protocol=args.protocol,
        tasks=args.tasks,
        flip=args.flip,
        save_predictions=args.save_predictions,
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
    if not is_main():
        return 0
    write_json(out, report)
    print(f"{report['num_images']} images, {report['checkpoint']}")
    for line in report["damaged"]:
        print(f"warning: left out: {line}", file=sys.stderr)
    print(metrics_table(report["metrics"], protocol_of(report)))
    print(out)
    return 0


def report_name(args: argparse.Namespace) -> str:
    """A file for each way to evaluate: one of a part never takes the place of the whole."""
    parts = (
        args.checkpoint,
        args.protocol.replace(":", "-"),
        args.split,
        "flip" if args.flip else None,
        f"keep{args.keep_rate:g}" if args.keep_rate else None,
        "+".join(args.tasks) if args.tasks else None,
        f"first{args.max_val}" if args.max_val else None,
        args.precision,
    )
    return f"metrics-{'-'.join(filter(None, parts))}.json"


def evaluate_run(
    run: str | Path,
    *,
    checkpoint: str = "last",
    protocol: str = "network",
    tasks: Sequence[str] | None = None,
    flip: bool = False,
    save_predictions: Path | None = None,
    device: str = "auto",
    changes: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Metrics of a run with the way they were measured, as plain data. Under torchrun the processes share the images.

    Args:
        protocol: ``network``, ``original`` or ``resized:HxW``, see ``tools/evaluate.py --help``.
        tasks: some of the run's tasks, all by default.
        flip: average with the predictions for the mirrored images.
        save_predictions: folder to write them into, see ``m3bsr.engine.predictions``.
        changes: dotted config fields to set otherwise (``data.root`` ...); None leaves a field as it was.

    Raises:
        FileNotFoundError, ValueError: no run, no data, a damaged checkpoint, an unknown task or protocol, a folder for
            predictions that holds something.
    """
    where = pick_device(device)
    parse_target_size(protocol, "--protocol")
    changes = {name: value for name, value in (changes or {}).items() if value is not None}
    with processes(where) as where:
        config, model, folder = open_run(run, checkpoint, {n: v for n, v in changes.items() if n.startswith("bsr.")})
        config = replace(config, changes)
        for task in tasks or ():
            lookup(dict.fromkeys(config.data.tasks), task, f"task of {run}")
        config = replace(config, {"data.tasks": tuple(tasks or config.data.tasks)})
        wanted = build_tasks(config)
        if save_predictions and num_processes() > 1:
            raise ValueError("--save-predictions: run it as one process, not under torchrun")
        writer = PredictionWriter(save_predictions, wanted) if save_predictions else None
        _, val_set = build_datasets(config, target_size=protocol)
        metrics = evaluate(
            model.to(where),
            wanted,
            eval_loader(val_set, batch_size=config.train.eval_batch_size, num_workers=config.data.num_workers),
            where,
            config.train.precision,
            progress and is_main(),
            flip=flip,
            writer=writer,
            num_workers=config.data.num_workers,
        )
        sizes = {"val": len(val_set)}  # type: ignore[arg-type]
        DamagedSamples(sizes, config.data.max_skipped).note("val", {KEY: metrics.damaged})
    about = {
        "run": str(run),
        "checkpoint": str(folder),
        "protocol": protocol,
        "network_size": list(config.data.image_size),
        "flip": flip,
        "data": {"name": config.data.name, "split": config.data.val_split, "max_val": config.data.max_val},
        "precision": config.train.precision,
        "num_images": metrics.num_images,
        "damaged": list(metrics.damaged),
        "metrics": metrics,
    }
    if writer is not None:
        writer.finish(about)
    return about


def protocol_of(report: Mapping[str, Any]) -> str:
    """The protocol with its size: ``network 240x320, flip``."""
    size = " {}x{}".format(*report["network_size"]) if report["protocol"] == "network" else ""
    return f"{report['protocol']}{size}{', flip' if report.get('flip') else ''}"
