"""``tools/report.py RUN``: write a run's ``report.html`` again, with pictures from its checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from m3bsr.build import build_datasets, build_tasks
from m3bsr.cli.common import one_line_errors, open_run, pick_device, write_json
from m3bsr.cli.measure_cost import measure
from m3bsr.config import Config, replace
from m3bsr.engine.evaluate import Metrics
from m3bsr.engine.precision import autocast
from m3bsr.report.collect import Collected, collect_from
from m3bsr.report.routing import routing_pictures
from m3bsr.report.run import COST, run_report
from m3bsr.tasks.base import Task


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/report.py", description="Write the report of a run again.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--checkpoint", default="best", choices=("last", "best", "previous"), help="for the pictures")
    parser.add_argument("--root", help="where the data lies now, if it was moved")
    parser.add_argument("--pictures", type=int, default=4, help="number of photographs; 0 needs neither data nor model")
    parser.add_argument("--cost", action="store_true", help="measure the cost of a training step (again)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    collected = None
    if args.pictures > 0 or args.cost:
        device = pick_device(args.device)
        config, model, _ = open_run(args.run, args.checkpoint)
        config = replace(config, {"run.device": args.device, "data.root": args.root or config.data.root})
        if args.pictures > 0:
            collected = pictures_of(config, model.to(device), args.pictures)
        if args.cost:
            write_cost(args.run, config, model)
    print(run_report(args.run, collected))
    return 0


def pictures_of(config: Config, model: nn.Module, num: int = 4) -> Collected:
    """What `model` makes of evenly spaced validation images.

    Raises:
        FileNotFoundError, ValueError: the data is not where the config says.
    """
    _, val_set = build_datasets(config)
    precision = autocast(next(model.parameters()).device, config.train.precision)
    return collect_from(model, build_tasks(config), val_set, num, autocast=precision)


def write_cost(run_dir: str | Path, config: Config, model: nn.Module, repeats: int = 5) -> dict[str, Any]:
    """Measure a training step into `cost.json` of the run folder. The weights of `model` are as before afterwards."""
    weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    was_training = model.training
    try:
        cost = measure(config, model=model, repeats=repeats).to_dict()
    finally:
        model.load_state_dict(weights)
        model.train(was_training)
    write_json(Path(run_dir) / COST, cost)
    return cost


def make_reporter(
    tasks: Mapping[str, Task], dataset: Any, num: int = 2
) -> Callable[[nn.Module, Metrics], Mapping[str, np.ndarray]]:
    """For `engine.train(reporter=...)`: pictures `{tag: uint8 [H, W, 3]}` at each evaluation: predictions of some
    images, and heat maps of where the validation set's tokens went."""

    def report(model: nn.Module, metrics: Metrics) -> Mapping[str, np.ndarray]:
        pictures = routing_pictures(metrics.routing)
        for sample in collect_from(model, tasks, dataset, num, longest=320).samples:
            for task, picture in sample.predictions.items():
                both = [sample.targets[task], picture] if task in sample.targets else [picture]
                pictures[f"{task}/{sample.name}"] = np.concatenate(both, axis=1)
        return pictures

    return report


def finish_run(
    run_dir: str | Path, config: Config, model: nn.Module, tasks: Mapping[str, Task], val_set: Any, *, cost: bool = True
) -> Path:
    """At the end of a training: cost of a step, pictures, `report.html`; returns its path."""
    device = next(model.parameters()).device
    if cost:
        write_cost(run_dir, config, model, repeats=3)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    collected = collect_from(model, tasks, val_set, 4, autocast=autocast(device, config.train.precision))
    return run_report(run_dir, collected)
