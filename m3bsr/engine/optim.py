"""Optimizers: which parameters they get and with what weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from m3bsr.utils.lookup import lookup

NO_DECAY_NAMES = ("pos_embed", "cls_token", "dist_token", "reg_token")


def _adamw(groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], **_: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=betas)


def _sgd(groups: Iterable[dict[str, Any]], *, momentum: float, **_: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=momentum)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw, "sgd": _sgd}


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    head_lr_scale: float = 1.0,
    head_prefixes: tuple[str, ...] = ("heads.",),
) -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that train; frozen ones are in none, so they get no optimizer state.

    No weight decay for biases, norms and other vectors, position embeddings and special tokens, nor for what the
    model names in a timm-style ``no_weight_decay()``. Parameters under ``head_prefixes`` learn ``head_lr_scale`` times
    faster. Each group carries its ``name`` and the ``param_names``; empty groups are left out.

    Raises:
        ValueError: nothing trains.
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for head in (False, True):
        for decays in (True, False):
            groups[head, decays] = {
                "params": [],
                "param_names": [],
                "name": ("heads" if head else "backbone") + ("" if decays else ", no decay"),
                "lr": lr * (head_lr_scale if head else 1.0),
                "weight_decay": weight_decay if decays else 0.0,
            }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rsplit(".", 1)[-1]
        decays = parameter.ndim > 1 and last not in ("bias", *NO_DECAY_NAMES) and name not in exempt
        group = groups[name.startswith(head_prefixes), decays]
        group["params"].append(parameter)
        group["param_names"].append(name)
    filled = [group for group in groups.values() if group["params"]]
    if not filled:
        raise ValueError("nothing trains: every parameter is frozen; see bsr.train_blocks")
    return filled


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.05,
    head_lr_scale: float = 1.0,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """An optimizer of ``OPTIMIZERS`` over :func:`param_groups`.

    Raises:
        ValueError: unknown name, or nothing trains.
    """
    groups = param_groups(model, lr=lr, weight_decay=weight_decay, head_lr_scale=head_lr_scale)
    return lookup(OPTIMIZERS, name, "optim.name")(groups, momentum=momentum, betas=betas)
