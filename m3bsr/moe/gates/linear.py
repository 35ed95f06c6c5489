"""What all gates share: the small weight, full-precision logits, and the windows of experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def gate_weight(in_dim: int, num_experts: int) -> nn.Parameter:
    """A gate weight `[in_dim, num_experts]` with std .02, so that routing starts near uniform.

    The published gates use Kaiming uniform on `[D, E]`, which takes E for the fan-in: with D=384 and E=16 the first
    softmax is then nearly one-hot.
    """
    return nn.Parameter(torch.empty(in_dim, num_experts).normal_(std=0.02))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast switched off: a router in bf16 flips choices between nearly equal experts."""
    with torch.autocast(device.type, enabled=False):
        yield


def router_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 where the tokens are (for gradcheck)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gate_logits(x_TD: Tensor, w_gate: Tensor, window: tuple[int, int]) -> Tensor:
    """Logits `[T, end - first]` in router precision; must be called inside `full_precision`."""
    dtype = router_dtype(x_TD)
    return x_TD.to(dtype) @ w_gate[:, window[0] : window[1]].to(dtype)


def check_gate(num_experts: int, top_k: int, noise_std: float) -> None:
    """Raise ValueError for sizes that cannot route."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie in 1..num_experts={num_experts}, got {top_k}")
    if noise_std < 0:
        raise ValueError(f"noise_std must not be negative, got {noise_std}")


def expert_windows(num_tasks: int, num_experts: int, width: int) -> tuple[tuple[int, int], ...]:
    """A contiguous window `(first, end)` of `width` experts per task, evenly spread from 0 to `num_experts`.

    The first task starts at 0 and the last one ends at `num_experts`; neighbours overlap where the experts are few.
    """
    if not 1 <= width <= num_experts:
        raise ValueError(f"experts_per_task must lie in 1..num_experts={num_experts}, got {width}")
    room = num_experts - width
    starts = [0] if num_tasks == 1 else [round(i * room / (num_tasks - 1)) for i in range(num_tasks)]
    return tuple((start, start + width) for start in starts)
