"""How much memory this process can still get, and whether an error says that there was not enough."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

# What PyTorch's CPU allocator says; it has no exception class of its own.
CPU_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
CGROUP = Path("/sys/fs/cgroup")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is that of an allocator: CUDA's, PyTorch's on the CPU, or Python's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in CPU_MESSAGES)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still get: on CUDA what the device has left, else the least of what the machine, the
    control group (containers, Slurm) and ``ulimit -v`` leave. None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_available(), _cgroup_left(), _address_space_left()]
    return min((max(limit, 0) for limit in limits if limit is not None), default=None)


def _available() -> int | None:
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_left() -> int | None:
    most, used = _read(CGROUP / "memory.max").strip(), _read(CGROUP / "memory.current").strip()
    return int(most) - int(used) if most.isdecimal() and used.isdecimal() else None


def _address_space_left() -> int | None:
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = _read(Path("/proc/self/statm")).split()
    return most - int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if most != resource.RLIM_INFINITY and pages else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
