"""Optimizers: which parameters they get and with what weight decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from m3bsr.utils.lookup import lookup

NO_DECAY_NAMES = ("pos_embed", "cls_token", "dist_token", "reg_token")


# fused: one kernel instead of a dozen passes over every parameter, on CPUs and GPUs alike.
def _adamw(groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], **_: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def _sgd(groups: Iterable[dict[str, Any]], *, momentum: float, **_: Any) -> torch.optim.Optimizer:
    groups = list(groups)
    spread_out = any(isinstance(p, DTensor) for group in groups for p in group["params"])  # no fused kernel for those
    return torch.optim.SGD(groups, momentum=momentum, fused=not spread_out)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw, "sgd": _sgd}


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    head_lr_scale: float = 1.0,
    layer_decay: float = 1.0,
    head_prefixes: tuple[str, ...] = ("heads.", "refinement."),
) -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that train; frozen ones are in none, so they get no optimizer state.

    No weight decay for biases, norms and other vectors, position embeddings and special tokens, nor for what the
    model names in a timm-style ``no_weight_decay()``. Parameters under ``head_prefixes`` learn ``head_lr_scale`` times
    faster; with ``layer_decay`` what lies ``n`` blocks before the heads learns ``layer_decay ** n`` times as fast
    (BEiT, ICLR 2022). Each group carries its ``name`` and the ``param_names``.

    Raises:
        ValueError: nothing trains.
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    depth = 1 + max((block_of(name, -1) for name, _ in model.named_parameters()), default=-1)
    groups: dict[tuple[bool, bool, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rsplit(".", 1)[-1]
        decays = parameter.ndim > 1 and last not in ("bias", *NO_DECAY_NAMES) and name not in exempt
        head = name.startswith(head_prefixes)
        block = block_of(name, depth) if layer_decay != 1 and not head else depth
        where = "heads" if head else "backbone" if block == depth else f"block {block}" if block >= 0 else "embedding"
        new: dict[str, Any] = {
            "params": [],
            "param_names": [],
            "name": where + ("" if decays else ", no decay"),
            "lr": lr * (head_lr_scale if head else layer_decay ** (depth - block)),
            "weight_decay": weight_decay if decays else 0.0,
        }
        group = groups.setdefault((head, not decays, block), new)
        group["params"].append(parameter)
        group["param_names"].append(name)
    if not groups:
        raise ValueError("nothing trains: every parameter is frozen; see bsr.train_blocks")
    return [groups[key] for key in sorted(groups)]


def block_of(name: str, depth: int) -> int:
    """Block that a parameter belongs to by its name; -1 for what lies before the blocks, ``depth`` behind them."""
    found = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
    before = any(part in ("patch_embed", "norm_pre", *NO_DECAY_NAMES) for part in name.split("."))
    return int(found[1]) if found else -1 if before else depth


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.05,
    head_lr_scale: float = 1.0,
    layer_decay: float = 1.0,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """An optimizer of ``OPTIMIZERS`` over :func:`param_groups`.

    Raises:
        ValueError: unknown name, or nothing trains.
    """
    groups = param_groups(model, lr=lr, weight_decay=weight_decay, head_lr_scale=head_lr_scale, layer_decay=layer_decay)
    return lookup(OPTIMIZERS, name, "optim.name")(groups, momentum=momentum, betas=betas)
