"""The peak memory of a callable, measured.

On CUDA the caching allocator keeps the statistics. On CPU torch's profiler reports every allocation and release of
torch's allocator, also the temporaries inside an operator; their running sum has the peak. What the libraries below
torch take for themselves is not in it: mostly the scratch space of oneDNN's convolutions, which is nothing for a ViT,
but a third on top for a head of wide 3x3 convolutions.

The resident memory of a process is a coarser thing. glibc keeps freed blocks, and its growth was 15 to 40 % above the
bytes that were alive; with `MALLOC_MMAP_THRESHOLD_=65536` in the environment, so that freed blocks go back to the
system, it agrees with the sum of the allocations within 1 % (`tests/cost/test_memory.py`).
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Run `fn` once: by how many bytes memory rose above its start at the highest point (activations, gradients...).

    Run `fn` once before, if only its steady state matters (the first step of an optimizer makes its state).

    Raises:
        ValueError: a device without a way to measure.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_peak_growth(fn, device)
    if device.type == "cpu":
        return max(_running_sum(allocations(fn)))
    raise ValueError(f"peak memory can be measured on cpu and cuda, not on {device.type}")


def _cuda_peak_growth(fn: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


def allocations(fn: Callable[[], Any]) -> list[int]:
    """Bytes of every CPU allocation (positive) and release (negative) that torch makes while `fn` runs, in order."""
    # Kineto prints to stderr about devices that it does not find.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False
    ) as profiler:
        fn()
    kineto = profiler.profiler
    assert kineto is not None and kineto.kineto_results is not None
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    events = [e for e in events if e.device_type() == torch.autograd.DeviceType.CPU]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def _running_sum(steps: list[int]) -> list[int]:
    sums, total = [0], 0
    for step in steps:
        total += step
        sums.append(total)
    return sums


def resident_growth(fn: Callable[[], Any]) -> int | None:
    """Run `fn` once: by how many bytes the process's resident memory rose at its highest; None where Linux is not.

    Freed blocks that the C library kept hide in the start, so the number is a lower bound unless the process runs with
    `MALLOC_MMAP_THRESHOLD_=65536`. A cross-check, with everything in it that libraries allocate for themselves.
    """
    if platform.system() != "Linux" or not os.access(_CLEAR, os.W_OK):
        return None
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # resets VmHWM
    except OSError:  # some containers forbid it
        return None
    start = _status("VmRSS")
    fn()
    return max(0, _status("VmHWM") - start)


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
