"""``tools/train.py CONFIG [--section.field value ...]``: one run, from config to metrics."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from m3bsr.bsr.trainable import count_parameters
from m3bsr.build import (
    build_batch_transform,
    build_datasets,
    build_model,
    build_optimizer,
    build_prefix_cache,
    build_scheduler,
    build_tasks,
    compile_model,
    with_fixed_views,
    with_found_classes,
)
from m3bsr.cli.common import OUT_OF_MEMORY, metrics_table, one_line_errors, pick_device, write_json
from m3bsr.cli.evaluate import evaluate_run
from m3bsr.cli.options import parse_cli
from m3bsr.cli.out_of_memory import advice
from m3bsr.cli.report import finish_run, make_reporter
from m3bsr.config import Config, replace
from m3bsr.data.labelled import spread as evenly
from m3bsr.delta import save_delta
from m3bsr.engine import TrainResult, distributed, newest_checkpoint, train
from m3bsr.engine.choose_experts import choose_experts
from m3bsr.engine.distributed import from_main, is_main, num_processes, processes, together, who
from m3bsr.engine.progress import say
from m3bsr.engine.rng import seed_everything
from m3bsr.engine.shards import is_sharded, shard
from m3bsr.moe.parallel import check_processes
from m3bsr.utils.foreign import one_line, read_object
from m3bsr.utils.malloc import keep_freed_memory
from m3bsr.utils.memory import free_bytes, is_out_of_memory

# Batches that "top:n" counts the routing on.
NUM_COUNTING_BATCHES = 4
# What may differ between a run and its resumption without making it another run.
FREE_ON_RESUME = {
    *("run.dir", "run.resume", "run.overwrite", "run.device", "data.root", "data.num_workers", "data.max_val"),
    *("data.on_error", "data.max_skipped", "data.test_split"),
    *("bsr.cache_prefix", "run.cache_dir"),
    *("train.epochs", "train.max_steps", "train.eval_every", "train.eval_batch_size"),
    *("train.save_every", "train.log_every", "train.timeout_s", "train.parallel", "moe.expert_parallel"),
}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 for a user error, 3 for NaN or infinity, 4 when memory ran out, 5 for a lost process, 128 + signal
    number when a signal ended the run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    config, _ = parse_cli(arguments, "Train a model: CONFIG is a file of configs/.")
    device = pick_device(config.run.device)
    memory_bytes = free_bytes(device) if device.type == "cpu" else None
    try:
        result, summary = run(config)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = one_line(error)
    else:
        return _say_how_it_ended(config, result, summary)
    # Here the frames of the run, and with them its tensors, are gone: predicting needs little, but not nothing.
    if device.type == "cuda":  # not before: which device is this process's own is known only now
        torch.cuda.empty_cache()
        memory_bytes = free_bytes(device)
    hint = advice(config, arguments, memory_bytes) if memory_bytes else "lower train.batch_size, or see tools/plan.py"
    print(f"{who()}error: out of memory: {reason}; {hint}", file=sys.stderr)
    return OUT_OF_MEMORY


def _say_how_it_ended(config: Config, result: TrainResult, summary: Mapping[str, Any]) -> int:
    if not is_main():
        return 0 if result.stopped_by is None else 128 + result.stopped_by
    if result.stopped_by is not None:
        name = signal.Signals(result.stopped_by).name
        print(f"stopped by {name} after step {result.progress.step} of {result.progress.total_steps}")
        print(f"checkpoint: {result.checkpoint}; go on with --run.resume")
        return 128 + result.stopped_by
    print(metrics_table(summary["metrics"], summary["protocol"]))
    if test := summary.get("test"):
        print(f"{test['split']} split, {test['num_images']} images, {test['checkpoint']} checkpoint:")
        print(metrics_table(test["metrics"], test["protocol"]))
    print(f"report: {config.run.dir}/report.html")
    return 0


def run(config: Config, **options: Any) -> tuple[TrainResult, dict[str, Any]]:
    """Build, train and evaluate what ``config`` describes; write ``config.json`` and ``result.json``, ``cost.json``,
    ``delta.safetensors`` (what was trained, if not everything was) and ``report.html``.

    Under torchrun this is one of several processes, the first of which writes.

    Args:
        options: further keyword arguments of ``engine.train`` (``reporter``, ``progress_bar`` ...).

    Returns:
        What the loop did, and the content of ``result.json`` (written only when the run got to its end).

    Raises:
        ValueError, FileNotFoundError: a config that does not fit the data, weights or run folder.
        NonFiniteError: see ``engine.train``.
    """
    with processes(pick_device(config.run.device), config.train.timeout_s) as device:
        return _run(config, device, options)


def _run(config: Config, device: torch.device, options: Mapping[str, Any]) -> tuple[TrainResult, dict[str, Any]]:
    if device.type == "cpu":
        keep_freed_memory()
    run_dir = Path(config.run.dir)
    began = time.perf_counter()
    with together():
        check_processes(config.moe.expert_parallel, num_processes())
        config = with_fixed_views(with_found_classes(config))
        seed_everything(config.run.seed)
        tasks = build_tasks(config)
        train_set, val_set = build_datasets(config)
        if config.data.test_split:  # a split that is not there stops the run now, not at its end
            build_datasets(replace(config, {"data.val_split": config.data.test_split}))
    resume = from_main(lambda: prepare_run_dir(run_dir, config))
    config = from_main(lambda: with_chosen_experts(config, train_set, device, resume))
    with together():
        # A checkpoint has all weights, so the file that the run started from may be gone.
        model = build_model(replace(config, {"model.weights": ""}) if resume else config)
    if config.train.parallel == "fsdp":
        distributed.same_as_main([*model.parameters()])
        shard(model.to(device))
    with together():
        compile_model(config, model, device)
        optimizer = build_optimizer(config, model)
        scheduler = build_scheduler(config, optimizer, train_set)  # type: ignore[arg-type]
        made = {
            "batch_transform": build_batch_transform(config, tasks),
            "prefix_cache": build_prefix_cache(config, train_set),  # type: ignore[arg-type]
        }
        if is_main():
            run_dir.mkdir(parents=True, exist_ok=True)
            write_json(run_dir / "config.json", config.to_dict())
    options = {"reporter": make_reporter(tasks, val_set), **made, **options}
    result = train(
        model,
        tasks,
        train_set,
        val_set,
        optimizer,
        scheduler,
        run_dir=run_dir,
        resume=resume,
        device=device,
        **{**train_options(config), **options},
    )
    summary = summarise(result, model, device, time.perf_counter() - began)
    finished = from_main(lambda: not result.step_ms and (run_dir / "result.json").exists())
    if config.data.test_split and result.stopped_by is None and not finished:  # all processes share the images
        summary["test"] = test_metrics(config, device)
    if is_main() and is_sharded(model):
        write_json(run_dir / "result.json", summary)
        say(f"tools/report.py {run_dir} --cost writes the report, where the model fits into one process")
    elif is_main() and result.stopped_by is None and (result.step_ms or not (run_dir / "result.json").exists()):
        write_json(run_dir / "result.json", summary)
        optimizer.state.clear()  # the measured step has an optimizer of its own; two states would count twice
        if config.model.method == "bsr" and config.bsr.train_blocks != "all":
            save_delta(model, run_dir / "delta.safetensors", base_name=config.model.backbone)
        with torch.compiler.set_stance("force_eager"):  # counts what operators do, and other shapes are not worth it
            finish_run(run_dir, config, model, tasks, val_set)
    return result, summary


def train_options(config: Config) -> dict[str, Any]:
    """What ``engine.train`` is told of a config, as its keyword arguments."""
    return {
        "config_dict": config.to_dict(),
        "epochs": config.train.epochs,
        "max_steps": config.train.max_steps,
        "batch_size": config.train.batch_size,
        "accumulate": config.train.accumulate,
        "eval_every": config.train.eval_every,
        "eval_batch_size": config.train.eval_batch_size,
        "save_every": config.train.save_every,
        "log_every": config.train.log_every,
        "num_workers": config.data.num_workers,
        "max_skipped": config.data.max_skipped,
        "num_views": config.data.num_views,
        "seed": config.run.seed,
        "precision": config.train.precision,
        "clip_norm": config.train.clip_norm,
        "ema_decay": config.train.ema_decay,
        "loss_weights": config.loss.weights,
        "loss_balance": config.loss.balance,
        "loss_conflict": config.loss.conflict,
        "loss_stride": config.loss.stride,
        "balance_weight": config.moe.balance_weight,
        "z_weight": config.moe.z_weight,
        "expert_parallel": config.moe.expert_parallel,
    }


def test_metrics(config: Config, device: torch.device) -> dict[str, Any]:
    """Metrics on ``data.test_split`` of the checkpoint that val chose, or of the last where val chose none."""
    run = Path(config.run.dir)
    which = "best" if (run / "checkpoints" / "best").is_dir() else "last"
    changes = {"data.val_split": config.data.test_split, "data.root": config.data.root}
    report = evaluate_run(run, checkpoint=which, device=str(device), changes=changes, progress=False)
    kept = {name: report[name] for name in ("num_images", "protocol", "metrics")}
    return {"split": config.data.test_split, "checkpoint": which, **kept}


def prepare_run_dir(run_dir: Path, config: Config) -> bool:
    """Make sure that no finished work is lost; whether there is a checkpoint to go on from.

    Raises:
        ValueError: the folder holds a run, and neither ``run.resume`` nor ``run.overwrite`` was asked for; or the
            run to resume had other settings.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run.dir: {run_dir} is a file")
    checkpoints = run_dir / "checkpoints"
    if config.run.resume:
        newest, complaints = newest_checkpoint(checkpoints)
        if newest is not None:
            _check_same_settings(read_object(newest / "config.json"), config, newest)
        return newest is not None or bool(complaints)
    if config.run.overwrite:
        shutil.rmtree(checkpoints, ignore_errors=True)
        for name in ("events.out.tfevents.*", "log.jsonl", "result.json", "cost.json", "delta.safetensors"):
            for path in run_dir.glob(name):
                path.unlink()
    elif checkpoints.exists() or (run_dir / "result.json").exists():
        raise ValueError(
            f"run.dir: {run_dir} already holds a run; "
            "--run.resume goes on with it, --run.overwrite throws it away, another --run.dir keeps it"
        )
    return False


def with_chosen_experts(config: Config, train_set: Any, device: torch.device, resume: bool) -> Config:
    """``bsr.train_experts="top:n"`` turned into the experts themselves: measured, or on resume those of the run."""
    wanted = config.bsr.train_experts
    if not isinstance(wanted, str) or wanted == "all" or config.model.method != "bsr":
        return config
    if resume:
        saved = read_object(Path(config.run.dir) / "config.json")
        return replace(config, {"bsr.train_experts": Config.from_dict(saved).bsr.train_experts})
    model = build_model(replace(config, {"bsr.train_experts": "all"})).to(device)
    depth, size = len(model.backbone.blocks), config.train.batch_size
    blocks = range(depth) if config.bsr.train_blocks == "all" else config.bsr.train_blocks
    # Spread out: the first so many of sorted folders are one class, of several data sets the first.
    indices = evenly(range(len(train_set)), NUM_COUNTING_BATCHES * size)
    batches = torch.stack([train_set[i]["image"] for i in indices]).to(device).split(size)
    experts = choose_experts(model, batches, tuple(blocks), int(wanted.removeprefix("top:")))
    seed_everything(config.run.seed)  # training must not depend on how many numbers the counting drew
    return replace(config, {"bsr.train_experts": experts})


def _check_same_settings(saved: Mapping[str, Any], config: Config, checkpoint: Path) -> None:
    changed = changed_settings(saved, config, FREE_ON_RESUME)
    if changed:
        name, *others = changed
        (then, now), more = changed[name], f" (and {', '.join(others)})" if others else ""
        raise ValueError(
            f"run.resume: {checkpoint} was trained with {name} = {then}, now it is {now}{more}; "
            "resume with the same settings, or start another run.dir"
        )


def changed_settings(
    saved: Mapping[str, Any], config: Config, free: Collection[str]
) -> dict[str, tuple[object, object]]:
    """Fields with their values then and now, without those in ``free`` and those that ``saved`` does not have."""
    then, now = _flat(saved), _flat(json.loads(config.to_json()))
    measured = {"bsr.train_experts"} if str(now["bsr.train_experts"]).startswith("top:") else set()
    names = [name for name in now if name not in free and name not in measured and name in then]
    return {name: (then[name], now[name]) for name in names if then[name] != now[name]}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    sections = {name: fields for name, fields in config.items() if isinstance(fields, Mapping)}
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}


def summarise(result: TrainResult, model: nn.Module, device: torch.device, wall_s: float) -> dict[str, Any]:
    """What ``result.json`` holds."""
    at, count = result.progress, count_parameters(model.parameters())
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    memory: dict[str, Any] = {"process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        memory["cuda_bytes"] = torch.cuda.max_memory_allocated(device)
    return {
        "step": at.step,
        "total_steps": at.total_steps,
        "protocol": at.protocol,
        "metrics": at.metrics,
        "best": {"step": at.best_step, "metrics": at.best_metrics},
        "parameters": {"trained": count.trained, "total": count.total},
        "step_ms": spread(result.step_ms),
        "data_wait": result.data_wait,
        "peak_memory": memory,
        "num_overflows": at.num_overflows,
        "num_damaged": {split: len(lines) for split, lines in at.damaged.items()},
        "wall_s": wall_s,
        "num_processes": result.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Number, median, 10th and 90th percentile."""
    if len(values) < 2:
        return {"num": len(values), **({"median": values[0]} if values else {})}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"num": len(values), "median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1]}
