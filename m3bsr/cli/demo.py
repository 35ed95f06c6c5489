"""``tools/demo.py``: the whole story on generated rooms, from nothing to a page to look at.

Draws two domains of ray-cast rooms, trains a small M3ViT on the source domain, then adapts it to the target domain
twice, by block selective reprogramming and by full fine-tuning, and puts the two side by side.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3bsr.build import build_datasets, build_model, build_tasks
from m3bsr.cli.common import one_line_errors
from m3bsr.cli.compare_runs import write_comparison
from m3bsr.cli.train import run as train_run
from m3bsr.config import Config, load_config, replace
from m3bsr.data.files import dataset_path
from m3bsr.engine.evaluate import evaluate
from m3bsr.engine.loader import eval_loader

FULL = {"bsr.train_blocks": "all", "bsr.drop_blocks": (), "bsr.restore_before": None}
DOMAINS = ("source", "target")
NOTE = (
    "All rows are scored on the target domain. Both adaptations start from the source model and see the same images in "
    "the same order; step, memory and GMACs are measured on this machine by the same command."
)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/demo.py", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("datasets/scenes/data"), help="folder of the rooms")
    parser.add_argument("--train", type=int, default=480, help="training pictures a domain")
    parser.add_argument("--val", type=int, default=48, help="validation pictures a domain")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each adaptation")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="shorten: train.max_steps=4 ...")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    began = time.perf_counter()
    configs = demo_configs(args.dir, args.data, dict(_field(text) for text in args.set))
    shutil.rmtree(args.dir, ignore_errors=True)
    for number, domain in enumerate(DOMAINS, start=1):
        say(f"{number}/5 drawing rooms, {domain} domain")
        draw_rooms(dataset_path(args.data / domain), domain, args.train, args.val)
    for number, (name, what) in enumerate(STEPS.items(), start=3):
        say(f"{number}/5 {what}")
        result, _ = train_run(configs[name])
        if result.stopped_by is not None:
            print(f"stopped by {signal.Signals(result.stopped_by).name}; start again with the same command")
            return 128 + result.stopped_by
    say("comparing: steps timed in turns")
    write_comparison(
        args.dir,
        {name: [args.dir / name] for name in ("bsr", "full")},
        reference="full",
        rounds=args.rounds,
        title="BSR beside full fine-tuning",
        subtitle="A small M3ViT, four dense tasks, ray-cast rooms of another domain",
        note=NOTE,
        first_rows={"not adapted": source_row(configs)},
    )
    print(f"{time.perf_counter() - began:.0f} s; every run has a report of its own under {args.dir}/*/report.html")
    return 0


STEPS = {
    "source": "training a small M3ViT from scratch on the source domain",
    "bsr": "adapting it to the target domain: block selective reprogramming",
    "full": "adapting it to the target domain: full fine-tuning, for comparison",
}


def demo_configs(folder: Path, data: Path, changes: Mapping[str, Any]) -> dict[str, Config]:
    """The three runs, from ``configs/scenes_*.py``."""
    configs = Path("configs")
    if not configs.is_dir():
        raise FileNotFoundError("configs/ not found: run the demo in the root of the repository")
    source, bsr = (load_config(configs / f"scenes_{name}.py") for name in ("source", "bsr"))
    weights = str(folder / "source" / "checkpoints" / "last" / "model.safetensors")
    runs = {"source": source, "bsr": bsr, "full": replace(bsr, FULL)}
    return {
        name: replace(
            config,
            {
                "run.dir": str(folder / name),
                "data.root": str(data / ("source" if name == "source" else "target")),
                **({} if name == "source" else {"model.weights": weights}),
                **changes,
            },
        )
        for name, config in runs.items()
    }


def draw_rooms(out: Path, domain: str, num_train: int, num_val: int) -> None:
    """Run ``make_scenes.py``; a set that is already there is left as it is."""
    options = ["--out", str(out), "--domain", domain, "--size", "128x160"]
    numbers = ["--train", str(num_train), "--val", str(num_val)]
    done = subprocess.run([sys.executable, "datasets/scenes/make_scenes.py", *options, *numbers], check=False)
    if done.returncode:
        raise ValueError(f"drawing the {domain} rooms failed (see above); remove {out} and try again")


def source_row(configs: Mapping[str, Config]) -> dict[str, Any]:
    """The source model on the target domain, before any adaptation."""
    config = replace(configs["bsr"], FULL)
    _, val_set = build_datasets(config)
    model, tasks = build_model(config), build_tasks(config)
    loader = eval_loader(val_set, batch_size=config.train.eval_batch_size)
    metrics = evaluate(model, tasks, loader, "cpu", config.train.precision)
    return {f"{name} {task.main_metric}": metrics[name][task.main_metric] for name, task in tasks.items()}


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _field(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if not value.lstrip("-").isdecimal():
        raise ValueError(f"--set takes FIELD=NUMBER, got {text!r}")
    return name, int(value)
