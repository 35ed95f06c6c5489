"""Step times that can be compared: several callables take turns, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of every run of one callable, in order."""

    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.seconds) * 1e3

    @property
    def spread_ms(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        if len(self.seconds) < 2:
            return self.median_ms, self.median_ms
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low * 1e3, high * 1e3


def time_interleaved(
    fns: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 7,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each callable `repeats` times, in rounds; every other round goes backwards, so that none always comes first.

    Args:
        clock: `time.process_time` counts the processor time of this process alone, for a machine with other work on it.

    Raises:
        ValueError: no callable, or fewer than one repeat.
    """
    if not fns or repeats < 1 or warmup < 0:
        raise ValueError(f"need callables and repeats >= 1 and warmup >= 0, got {list(fns)}, {repeats}, {warmup}")
    device = torch.device(device)
    for _ in range(warmup):
        for fn in fns.values():
            fn()
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    names = list(fns)
    for round_index in range(repeats):
        for name in names if round_index % 2 == 0 else reversed(names):
            seconds[name].append(_time_once(fns[name], device, clock))
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def time_steps(
    fn: Callable[[], Any], *, repeats: int = 7, warmup: int = 2, device: torch.device | str = "cpu"
) -> Timing:
    """Time one callable."""
    return time_interleaved({"fn": fn}, repeats=repeats, warmup=warmup, device=device)["fn"]


def paired_ratio(numerator: Timing, denominator: Timing) -> float:
    """Median over the rounds of the ratio within a round: steadier than a ratio of medians on a shared machine."""
    pairs = zip(numerator.seconds, denominator.seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)


def _time_once(fn: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    synchronize(device)
    start = clock()
    fn()
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
