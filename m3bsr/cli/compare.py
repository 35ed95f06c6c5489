"""``tools/compare.py CONFIG --methods full,head,lora,bsr``: ways of fine-tuning under one budget, in one table.

Every name in the table is a variant of CONFIG: a method of ``m3bsr.methods.METHODS`` (``--methods``), or any options of
``tools/train.py`` (``--variant early='--bsr.train-blocks 0 4 8 --bsr.keep-rate .7'``). Each is trained once a seed, by
the training command itself, into a run folder of its own, ``OUT/NAME-s0``. What is finished there is not trained again
and what was interrupted is resumed, so the same command goes on where it stopped.

The learning rate of a method is ``optim.lr`` times its ``lr_scale``; the heads learn at the config's rate throughout.
``--lr lora=1e-3`` sets another. A variant that sets ``--optim.lr`` keeps it.

``--single-task`` also trains each task of CONFIG alone, with the same data, epochs and seeds, and delta_m is against
those runs (otherwise against a row of the table). What differs for them besides the task goes into
``--single-task-options``, such as full fine-tuning of a dense ViT as a baseline of everything.
"""

from __future__ import annotations

import argparse
import gc
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m3bsr.build import build_model, with_found_classes
from m3bsr.cli import report
from m3bsr.cli.common import BAD_NUMBERS, one_line_errors
from m3bsr.cli.compare_runs import pick_reference, write_comparison
from m3bsr.cli.options import parse_cli
from m3bsr.cli.train import changed_settings
from m3bsr.cli.train import run as train_run
from m3bsr.config import Config, load_config, replace
from m3bsr.engine.finite import NonFiniteError
from m3bsr.methods import METHODS, find_method
from m3bsr.report.html import number
from m3bsr.report.run import COST, describe_data
from m3bsr.utils.foreign import read_object

# What may differ between a run that lies in OUT and the one that is asked for.
FREE = {"run.dir", "run.resume", "run.overwrite", "run.device", "data.root", "data.num_workers", "train.save_every"}


@dataclass(frozen=True)
class Variant:
    """A name in the table and the config behind it, for every seed."""

    name: str
    config: Config
    out: Path

    def run(self, seed: int) -> Config:
        folder = self.out / f"{self.name.replace(':', '-')}-s{seed}"
        return replace(self.config, {"run.dir": str(folder), "run.seed": seed, "run.resume": True})


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 for a user error, 3 if a run met NaN or infinity, 128 + signal number when a signal ended it."""
    args, overrides = _parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    variants = make_variants(args, overrides)
    alone = make_single_tasks(args, overrides, variants)
    check([*variants, *alone], args.seeds)
    failed = []
    jobs = [(variant, seed) for seed in range(args.seeds) for variant in (*variants, *alone)]
    for index, (variant, seed) in enumerate(jobs, start=1):
        config = variant.run(seed)
        if is_finished(config):
            continue
        print(f"\n== {index}/{len(jobs)} {variant.name}, seed {seed}: {config.run.dir}", flush=True)
        try:
            result, _ = train_run(config)
        except NonFiniteError as error:
            failed.append(config.run.dir)
            print(f"warning: {config.run.dir} is left out: {error}", file=sys.stderr)
            continue
        if result.stopped_by is not None:
            print(f"stopped by {signal.Signals(result.stopped_by).name}; the same command goes on from here")
            return 128 + result.stopped_by
        gc.collect()
    groups, baselines = finished_runs(variants, args.seeds), finished_runs(alone, args.seeds)
    if not groups:
        raise ValueError("no run got to its end: see the warnings above")
    write_comparison(
        args.out,
        groups,
        reference=pick_reference(groups, args.reference if args.reference in groups else None),
        rounds=args.rounds,
        pictures=args.pictures,
        title=f"Methods on {Path(args.config).stem}",
        subtitle=describe_data(variants[0].config.to_dict()),
        note=_note(variants, args.seeds, args.rounds > 0),
        baselines=baselines,
    )
    return BAD_NUMBERS if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/compare.py",
        description="Train CONFIG by several methods under one budget and put them side by side.",
        epilog="Any option of tools/train.py may follow, for all of them: --train.epochs 4. Methods: "
        + "; ".join(f"{name}: {method.what}" for name, method in METHODS.items()),
        allow_abbrev=False,
    )
    parser.add_argument("config", help="file of configs/")
    parser.add_argument("--methods", default="", help="names with commas between them: full,head,last:3,lora,bsr")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME='OPTIONS'", help="options of tools/train.py, by a name"
    )
    parser.add_argument("--single-task", action="store_true", help="also train each task alone, for delta_m")
    parser.add_argument(
        "--single-task-options", default="", metavar="'OPTIONS'", help="options of tools/train.py for these runs only"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, seeds 0, 1 ...")
    parser.add_argument("--lr", default="", metavar="NAME=VALUE,...", help="learning rates in place of the scaled ones")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of runs, tables and page")
    parser.add_argument("--reference", help="name that shares and delta_m are against (default: full, else the last)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="steps of each, timed in turns; 0 takes those of training"
    )
    parser.add_argument("--pictures", type=int, default=3, help="number of photographs on the page")
    return parser


def make_variants(args: argparse.Namespace, overrides: Sequence[str]) -> list[Variant]:
    """What to train, in the order of the table.

    Raises:
        ValueError: no or two equal names, an unknown method or option, a learning rate for nobody.
    """
    if args.seeds < 1:
        raise ValueError(f"--seeds must be a positive integer, got {args.seeds}")
    options = {name: ["--model.method", name] for name in filter(None, args.methods.split(","))}
    if len(options) < len(list(filter(None, args.methods.split(",")))):
        raise ValueError(f"--methods names one twice: {args.methods}")
    for text in args.variant:
        name, equals, more = text.partition("=")
        if not equals or not re.fullmatch(r"[\w.+-]+", name) or name in options:
            raise ValueError(f"--variant takes NAME='OPTIONS', each NAME (letters, digits, . + -) once, got {text!r}")
        options[name] = shlex.split(more)
    if not options and args.single_task:
        options = {load_config(args.config).model.method: []}  # CONFIG as it is
    if not options:
        raise ValueError("nothing to compare: name some with --methods full,bsr or --variant NAME='OPTIONS'")
    rates = dict(_rate(text, options) for text in filter(None, args.lr.split(",")))
    variants = []
    for name, more in options.items():
        config, _ = parse_cli([args.config, *overrides, *more], "")
        own_lr = any(word.partition("=")[0] in ("--optim.lr", "--optim.head-lr-scale") for word in more)
        variants.append(Variant(name, config if own_lr else scale_lr(config, rates.get(name)), args.out))
    return variants


def make_single_tasks(args: argparse.Namespace, overrides: Sequence[str], variants: Sequence[Variant]) -> list[Variant]:
    """Each task alone; none without ``--single-task``.

    Raises:
        ValueError: options of runs that nobody asked for, CONFIG has one task, or a name that is taken.
    """
    if not args.single_task:
        if args.single_task_options:
            raise ValueError("--single-task-options are for the runs of --single-task, which is not there")
        return []
    config, _ = parse_cli([args.config, *overrides, *shlex.split(args.single_task_options)], "")
    if len(config.data.tasks) < 2:
        raise ValueError(f"--single-task: {args.config} has one task already ({config.data.tasks[0]})")
    alone = []
    for task in config.data.tasks:
        name = f"single_{task}"
        if name in (variant.name for variant in variants):
            raise ValueError(f"--single-task names its runs {name}: give that variant another name")
        alone.append(Variant(name, scale_lr(replace(config, {"data.tasks": (task,)})), args.out))
    return alone


def finished_runs(variants: Sequence[Variant], num_seeds: int) -> dict[str, list[Path]]:
    """Run folders by name; only what got to its end."""
    runs = {v.name: [v.run(s) for s in range(num_seeds) if is_finished(v.run(s))] for v in variants}
    return {name: [Path(config.run.dir) for config in configs] for name, configs in runs.items() if configs}


def _rate(text: str, names: Mapping[str, object]) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if name not in names or not rate > 0:
        raise ValueError(f"--lr takes NAME=VALUE of {', '.join(names)}, VALUE above 0; got {text!r}")
    return name, rate


def scale_lr(config: Config, lr: float | None = None) -> Config:
    """The config with the learning rate of its method (or ``lr``), that of the heads as it was."""
    was = config.optim.lr
    lr = was * find_method(config.model.method)[0].lr_scale if lr is None else lr
    return replace(config, {"optim.lr": lr, "optim.head_lr_scale": config.optim.head_lr_scale * was / lr})


def check(variants: Sequence[Variant], num_seeds: int) -> None:
    """Find out before hours of training: whether every model can be built, and whose runs lie in OUT.

    Raises:
        ValueError, FileNotFoundError: a method or plan that does not fit, no data, a run with other settings.
    """
    for variant in variants:
        config = with_found_classes(variant.config)
        experts = config.bsr.train_experts
        unmeasured = {"bsr.train_experts": "all"} if isinstance(experts, str) else {}
        build_model(replace(config, {"model.weights": "", **unmeasured}))
        for seed in range(num_seeds):
            folder = Path(variant.run(seed).run.dir)
            if not (folder / "config.json").is_file():
                continue
            saved = read_object(folder / "config.json")
            changed = changed_settings(saved, replace(config, {"run.seed": seed}), FREE)
            if changed:
                name, (then, now) = next(iter(changed.items()))
                raise ValueError(
                    f"{folder} was trained with {name} = {then}, {variant.name} now has {now}; "
                    "give the same options, another --out, or remove that folder"
                )


def is_finished(config: Config) -> bool:
    """Whether the run lies in its folder, trained to the end; one that lacks its costs gets them now."""
    folder = Path(config.run.dir)
    if not (folder / "result.json").is_file():
        return False
    if not (folder / COST).is_file():
        report.main([str(folder), "--cost", "--checkpoint", "last"])
    return True


def _note(variants: Sequence[Variant], num_seeds: int, timed_in_turns: bool) -> str:
    rates = ", ".join(f"{v.name} {number(v.config.optim.lr, 2)}" for v in variants)
    seeds = f"{num_seeds} seeds" if num_seeds > 1 else "One seed"
    how = "in turns on one machine" if timed_in_turns else "in training"
    return (
        f"{seeds}, the same data and epochs for all; learning rates of the backbone: {rates}. Memory and GMACs are "
        f"measured by the same command; steps were timed {how}."
    )
