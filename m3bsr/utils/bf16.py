"""Whether bfloat16 is arithmetic of this processor, or only emulated."""

from __future__ import annotations

import functools

import torch


@functools.cache
def cpu_emulates_bf16() -> bool:
    """True on x86 processors without AVX512-BF16 and AMX: right results, but several times slower than fp32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    known = [getattr(torch.cpu, name)() for name in checks if hasattr(torch.cpu, name)]
    return torch.backends.cpu.get_cpu_capability().startswith("AVX") and bool(known) and not any(known)
