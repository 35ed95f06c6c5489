"""Targets at a lower resolution, so that a training loss need not pay for full-size logits."""

from __future__ import annotations

import torch
from torch import Tensor


def resize_nearest(target: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour samples of ``target [..., H, W]`` on a grid of ``size = (h, w)``; any dtype, no blending.

    Sample ``i`` is read at ``floor((i + 0.5) * H / h)``, the pixel centre that a bilinear resize with
    ``align_corners=False`` is centred on (``nearest-exact`` in PyTorch, which refuses integer tensors). Labels and
    ``IGNORE`` marks survive exactly. ValueError for an empty size.
    """
    height, width = target.shape[-2:]
    h, w = size
    if h < 1 or w < 1:
        raise ValueError(f"cannot resize a target to {h}x{w}: both sides must be at least 1")
    if (h, w) == (height, width):
        return target
    rows = _centres(height, h, target.device)
    columns = _centres(width, w, target.device)
    return target[..., rows[:, None], columns[None, :]]


def at_stride(target: Tensor, stride: int) -> Tensor:
    """``target [..., H, W]`` at ``[..., ceil(H / stride), ceil(W / stride)]`` by nearest sampling."""
    if stride < 1:
        raise ValueError(f"loss stride must be at least 1, got {stride}")
    height, width = target.shape[-2:]
    return resize_nearest(target, (-(-height // stride), -(-width // stride)))


def check_same_size(prediction: Tensor, target: Tensor, what: str) -> None:
    """ValueError unless prediction and target are both ``[B, C, H, W]`` with equal B, H and W."""
    if prediction.ndim != 4 or target.ndim != 4:
        raise ValueError(
            f"{what}: prediction and target must be [B, C, H, W], "
            f"got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    if prediction.shape[0] != target.shape[0] or prediction.shape[2:] != target.shape[2:]:
        raise ValueError(
            f"{what}: prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in batch or size; "
            "resize the target with Task.resize_target or the prediction with the head's size argument"
        )


def _centres(length: int, count: int, device: torch.device) -> Tensor:
    # Integer arithmetic: (2 i + 1) * length // (2 count) is floor((i + .5) * length / count) without rounding trouble.
    return (2 * torch.arange(count, device=device) + 1) * length // (2 * count)
