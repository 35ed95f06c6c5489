"""Number formats of the forward pass."""

from __future__ import annotations

import torch

from m3bsr.utils.bf16 import cpu_emulates_bf16

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of ``precision`` (``fp32``: switched off) on ``device``.

    Raises:
        ValueError: an unknown precision, or fp16 without CUDA (its gradients underflow without loss scaling).
    """
    if precision not in PRECISIONS:
        raise ValueError(f"train.precision: unknown {precision!r}, known: {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"train.precision: fp16 needs a CUDA device, this is {device.type}; use bf16 or fp32")
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def is_slow(device: torch.device, precision: str) -> bool:
    """Whether this CPU only emulates ``bf16``: right results, but steps several times slower than in fp32."""
    return device.type == "cpu" and precision == "bf16" and cpu_emulates_bf16()
