"""Keep freed memory in the process on Linux: glibc otherwise returns every block over 32 MB to the system.

Such a block is mapped afresh, and page-faulted, in every training step; that is up to a quarter of a CPU step. With
the settings below the allocator keeps and reuses it. The price: memory once used is not returned to the system.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4


def keep_freed_memory() -> bool:
    """Switch it on for this process, before large tensors are made. Returns whether it was applied (glibc only)."""
    return _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20})


def return_freed_memory() -> bool:
    """Back to what glibc does by itself once its thresholds have grown as far as they can, 32 and 64 MB: to compare."""
    grown = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20, _M_TOP_PAD: 128 << 10}
    return _set(grown)


def _set(options: dict[int, int]) -> bool:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return all(mallopt(option, value) == 1 for option, value in options.items())
