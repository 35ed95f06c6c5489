"""``tools/score.py DIR --data.root ROOT``: metrics of predictions that lie on disk, of whatever model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from m3bsr.build import build_tasks
from m3bsr.cli.common import metrics_table, one_line_errors, write_json
from m3bsr.cli.evaluate import PROTOCOLS, protocol_of
from m3bsr.config import Config, DataConfig
from m3bsr.data import DATASETS
from m3bsr.data.dense import parse_target_size, trim_evenly
from m3bsr.engine.predictions import check_brightest, read_about, read_saved, saved_file
from m3bsr.tasks.base import Task
from m3bsr.tasks.scoring import Scorer
from m3bsr.utils.checks import did_you_mean
from m3bsr.utils.constants import IGNORE
from m3bsr.utils.lookup import lookup

MAX_FAULTS = 20


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print the metrics and write them to ``DIR/scores-PROTOCOL.json``; exit code 0, or 2 for faulty predictions."""
    parser = argparse.ArgumentParser(
        prog="tools/score.py",
        description="Score saved predictions, DIR/<task>/<name>.png|npy|mat (formats: m3bsr/engine/predictions.py).",
        epilog="What tools/evaluate.py --save-predictions wrote knows its data set, split and protocol.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--data.root", dest="root", required=True, help="folder of the data")
    parser.add_argument("--data.name", dest="name", help="data set (a name in m3bsr.data.DATASETS), default nyud")
    parser.add_argument("--data.tasks", dest="tasks", nargs="+", metavar="TASK", help="default: the folders in DIR")
    parser.add_argument("--data.val-split", dest="split", help="split to score, default val")
    parser.add_argument("--data.max-val", dest="max_val", type=int, help="only the first so many images")
    parser.add_argument("--protocol", help=f"{PROTOCOLS.partition('; ')[2]}; default original")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="processes that score edges")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if not args.folder.is_dir():
        raise FileNotFoundError(f"no such folder of predictions: {args.folder}")
    known = read_about(args.folder)
    protocol = args.protocol or known.get("protocol", "original")
    if protocol == "network":
        if "network_size" not in known:
            raise ValueError("--protocol network: only evaluation knows the network; say resized:HxW")
        protocol = "resized:{}x{}".format(*known["network_size"])
    parse_target_size(protocol, "--protocol")
    data = known.get("data", {})
    config = Config(
        data=DataConfig(
            name=args.name or data.get("name", "nyud"),
            root=args.root,
            tasks=tuple(args.tasks or ()) or tasks_in(args.folder, args.name or data.get("name", "nyud")),
            val_split=args.split or data.get("split", "val"),
            max_val=args.max_val or data.get("max_val"),
        )
    )
    if not args.tasks:
        _say_unscored(args.folder, config)
    report, faults = score(args.folder, config, protocol, num_workers=args.num_workers)
    for fault in faults[:MAX_FAULTS]:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        more = f"; the first {MAX_FAULTS} are above" if len(faults) > MAX_FAULTS else ""
        raise ValueError(f"{len(faults)} predictions of {args.folder} cannot be scored{more}")
    report["flip"] = bool(known.get("flip"))
    write_json(args.out or args.folder / f"scores-{protocol.replace(':', '-')}.json", report)
    print(f"{report['num_images']} images of {config.data.name}, split {config.data.val_split}")
    print(metrics_table(report["metrics"], protocol_of(report)))
    return 0


def tasks_in(folder: Path, dataset: str) -> tuple[str, ...]:
    """The tasks of a data set that a folder of predictions has folders for.

    Raises:
        ValueError: none.
    """
    known = lookup(DATASETS, dataset, "--data.name").known_tasks
    found = tuple(task for task in known if (folder / task).is_dir())
    if not found:
        raise ValueError(f"{folder} has no folder of a task of {dataset} ({', '.join(known)})")
    return found


def _say_unscored(folder: Path, config: Config) -> None:
    """Folders that are no task of the data set, such as ``sal`` of other programs, must not go unnoticed."""
    known = DATASETS[config.data.name].known_tasks
    for other in sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in known):
        near = did_you_mean(other, known)
        print(
            f"warning: not scored: {other}, no task of {config.data.name} ({', '.join(known)}){near}", file=sys.stderr
        )


def score(
    folder: Path, config: Config, protocol: str, *, num_workers: int = 0, progress: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Metrics of the predictions in ``folder`` as plain data, and a line for each that cannot be scored.

    An image without any valid label of a task needs no prediction for it.

    Raises:
        FileNotFoundError, ValueError: faulty data, or a task without answers per pixel.
    """
    tasks, data = build_tasks(config), config.data
    if flat := [name for name, task in tasks.items() if not task.dense]:
        raise ValueError(f"--data.tasks: {flat[0]} has one answer per image; scores are for answers per pixel")
    labels = DATASETS[data.name](data.root, data.val_split, data.tasks, max_samples=data.max_val, target_size=protocol)
    metrics: dict[str, Any] = {name: task.metric() for name, task in tasks.items()}
    faults: list[str] = []
    brightest = {name: 0 for name, task in tasks.items() if task.num_channels == 1 and ".png" in task.saved_suffixes}
    with Scorer(num_workers) as scorer:
        for index in tqdm(range(len(labels)), desc="score", unit="image", leave=False, disable=not progress):
            sample = labels[index]
            stored = labels.stored_size(sample["name"]) if protocol == "original" else None
            for name, task in tasks.items():
                if not (sample[name] != IGNORE).any():
                    continue
                path = saved_file(folder, name, task.saved_suffixes, sample["name"])
                try:
                    saved, target = read_matching(task, path, sample[name], protocol, stored)
                    scorer.add(task, metrics[name], saved[None], target[None], saved=True)
                    if name in brightest:
                        brightest[name] = max(brightest[name], int(saved.max()))
                except (ValueError, OSError) as error:
                    faults.append(str(error) if str(path) in str(error) else f"{path}: {error}")
        scorer.finish()
    for name, value in brightest.items():
        check_brightest(value, folder / name)
    scores = {name: metric.compute() for name, metric in metrics.items()}
    about = {"predictions": str(folder), "protocol": protocol, "num_images": len(labels)}
    return {**about, "data": {"name": data.name, "split": data.val_split}, "metrics": scores}, faults


def read_matching(
    task: Task, path: Path, target: Tensor, protocol: str, stored: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """A saved prediction and its label, of one size: of a padded label the middle, if the prediction is as large as
    the file of the label (``stored``).

    Raises:
        FileNotFoundError, ValueError: they are not of one size, see also ``read_saved``.
    """
    saved = read_saved(task, path)
    if stored and stored == (saved.shape[-2], saved.shape[-1]):
        target = trim_evenly(target, stored)
    if saved.shape[-2:] != target.shape[-2:]:
        sizes = ["{}x{}".format(*size) for size in (saved.shape[-2:], target.shape[-2:], stored or (0, 0))]
        unpadded = f", {sizes[2]} before it was padded" if stored else ""
        raise ValueError(f"{path} is {sizes[0]} pixels, its label {sizes[1]}{unpadded} (protocol {protocol})")
    return saved, target
