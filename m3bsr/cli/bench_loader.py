"""``tools/bench_loader.py CONFIG``: whether loading keeps up with training, and what limits it.

First the processor time of every part of loading one sample, on one core: what a step of a given length can hope for.
Then the loader of a run, with its workers, beside steps: real ones on the device of the config, or with ``--step-ms``
pauses of that length, as a GPU would leave the cores to the workers. A step takes ``batch_size * accumulate`` samples.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from m3bsr.build import build_batch_transform, build_datasets, build_tasks, with_fixed_views, with_found_classes
from m3bsr.cli.common import one_line_errors, take_number
from m3bsr.cli.measure_cost import step_job
from m3bsr.cli.options import parse_cli
from m3bsr.config import Config
from m3bsr.data.dense import DenseImages
from m3bsr.engine.loader import collate, train_loader
from m3bsr.engine.rng import derive_seed, isolated_rng

DESCRIPTION = (
    "Whether loading keeps up with training CONFIG, and what limits it. --steps N (default 10) times N steps, "
    "--step-ms MS takes pauses of MS milliseconds for steps (a GPU's) instead of real steps, --samples N profiles N "
    "samples (default 16)."
)
AIM = 0.02
"""Share of the time that a run may spend waiting for data."""


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    num_steps, num_samples = take_number(arguments, "--steps", 10), take_number(arguments, "--samples", 16)
    pause_ms = take_number(arguments, "--step-ms", 0)
    config, _ = parse_cli(arguments, DESCRIPTION)
    config = with_fixed_views(with_found_classes(config))
    train_set: Any = build_datasets(config)[0]
    parts = profile(train_set, num_samples)
    print(profile_table(parts))
    step = pause(pause_ms) if pause_ms else real_step(config)
    print(verdict(parts, config, *time_steps(train_set, config, num_steps, step)))
    return 0


def profile(dataset: Any, num_samples: int) -> dict[str, float]:
    """Milliseconds of processor time on one core for each part of loading a sample, medians; ``whole`` is one sample
    as the loader gets it, ``collate`` its share of putting a batch together."""
    times: dict[str, list[float]] = {}

    def timed(part: str, run: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = run()
        times.setdefault(part, []).append(1e3 * (time.process_time() - began))
        return result

    num_threads, transform = torch.get_num_threads(), dataset.transform
    torch.set_num_threads(1)  # as in a worker
    try:
        samples = []
        for i in range(num_samples):
            index = i % len(dataset)
            with isolated_rng(derive_seed(0, i)):
                samples.append(timed("whole", partial(dataset.__getitem__, index)))
            if isinstance(dataset, DenseImages):
                _time_reading(dataset, index, timed)
        dataset.transform = lambda sample: timed("transform", lambda: transform(sample))
        for i in range(num_samples):
            with isolated_rng(derive_seed(0, i)):
                dataset[i % len(dataset)]
        for _ in range(3):
            timed("collate", lambda: collate(samples))
    finally:
        dataset.transform = transform
        torch.set_num_threads(num_threads)
    parts = {part: statistics.median(values) for part, values in times.items()}
    return {**parts, "collate": parts["collate"] / num_samples}


def _time_reading(dataset: DenseImages, index: int, timed: Callable[[str, Callable[[], Any]], Any]) -> None:
    name = dataset.names[index]
    timed("read image", lambda: dataset.read_image(name))
    for task in dataset.dense_tasks:
        path = dataset.label_file(task, name)
        if path is not None:
            timed(f"read {task}", partial(dataset.read_target, task, path, name))


def profile_table(parts: Mapping[str, float]) -> str:
    """The parts in the order of their cost."""
    lines = ["processor time of one sample on one core"]
    known = {part: ms for part, ms in parts.items() if part != "whole"}
    known["other"] = max(0.0, parts["whole"] + parts["collate"] - sum(known.values()))
    for part, ms in sorted(known.items(), key=lambda item: -item[1]):
        lines.append(f"  {part:<16}{ms:8.2f} ms")
    return "\n".join([*lines, f"  {'together':<16}{parts['whole'] + parts['collate']:8.2f} ms"])


def pause(ms: float) -> Callable[[], None]:
    """A step that leaves the cores alone."""
    return lambda: time.sleep(ms / 1e3)


def real_step(config: Config) -> Callable[[], None]:
    """The micro-batches of one step of the config, on synthetic images of its size."""
    run = step_job(config).runner()

    def step() -> None:
        for _ in range(config.train.accumulate):
            run()

    return step


def time_steps(dataset: Any, config: Config, num_steps: int, step: Callable[[], None]) -> tuple[float, float, float]:
    """Mean milliseconds of waiting and of stepping in ``num_steps`` steps, and of the processor time that waiting took
    in this process; two steps before, while workers start, are left out."""
    t, waits, steps, busy = config.train, [], [], []
    loader = train_loader(
        dataset,
        batch_size=t.batch_size,
        start_step=0,
        stop_step=(num_steps + 2) * t.accumulate,
        seed=config.run.seed,
        num_workers=config.data.num_workers,
        batch_transform=build_batch_transform(config, build_tasks(config)),
        num_views=config.data.num_views,
    )
    batches = iter(loader)
    for _ in range(num_steps + 2):
        began, busy_before = time.perf_counter(), time.process_time()
        for _ in range(t.accumulate):
            next(batches)
        loaded = time.perf_counter()
        busy.append(time.process_time() - busy_before)
        step()
        waits.append(loaded - began)
        steps.append(time.perf_counter() - loaded)
    wait_ms, step_ms, busy_ms = (1e3 * statistics.mean(times[2:]) for times in (waits, steps, busy))
    return wait_ms, step_ms, busy_ms


def verdict(parts: Mapping[str, float], config: Config, wait_ms: float, step_ms: float, busy_ms: float = 0.0) -> str:
    """How long the loader was waited for, what it can deliver, and what stands in the way of more."""
    cores = os.cpu_count() or 1
    at_once = max(1, min(config.data.num_workers, cores))
    per_step = config.train.batch_size * config.train.accumulate
    shortest_ms = per_step * (parts["whole"] + parts["collate"]) / at_once
    share = wait_ms / (wait_ms + step_ms)
    slowest = max((part for part in parts if part not in ("whole", "collate")), key=lambda part: parts[part])
    where = f"{config.data.num_workers} workers on {cores} cores" if config.data.num_workers else "no workers"
    lines = [
        f"{where} can load {1e3 * per_step / shortest_ms:.1f} samples a second: "
        f"enough for steps ({per_step} samples) of {shortest_ms:.0f} ms and more",
        f"steps of {step_ms:.0f} ms: waited {share:.1%} of the time (aim: under {AIM:.0%})",
    ]
    if share >= AIM:
        if config.data.num_workers == 0:
            why = "samples are loaded in the training process: set data.num_workers"
        elif shortest_ms > step_ms:
            why = f"processor time of the workers, of which {slowest!r} takes most: more cores, or smaller files"
        elif busy_ms > wait_ms / 2:
            why = "the training process, which takes batches over and frees them: smaller labels (loss.stride)"
        else:
            why = "not the workers' own work: other work on the cores, or a disk that is slow to read"
        lines.append(f"what limits it: {why}")
    return "\n".join(lines)
