"""Names of the published (fastmoe, M3ViT) checkpoints <-> ours, for the tensors of one MoE layer.

Published: `experts.htoh4.weight [E, H, D]`, `experts.h4toh.weight [E, D, H]` and their biases, `gate.{t}.w_gate [D, E]`
with the task's number (multi gate) or `gate.w_gate` (one gate). Ours: `experts.fc1`, `experts.fc2`, `gates.{task}`.
fastmoe 1.1 writes an entry per expert instead, `experts.{e}.htoh4.weight [1, H, D]`; that is read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

EXPERT_NAMES = {"htoh4": "fc1", "h4toh": "fc2"}
_OUR_EXPERT_NAMES = {ours: theirs for theirs, ours in EXPERT_NAMES.items()}
_EXPERT = re.compile(r"experts\.(?:(?P<id>\d+)\.)?(?P<name>htoh4|h4toh)\.(?P<kind>weight|bias)")
_GATE = re.compile(r"gate\.(?:(?P<task>\d+)\.)?(?P<name>w_gate|w_noise)")
_IS_EXPERT = re.compile(r"(^|\.)experts\.")


def from_published(state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """Our names for one layer's tensors (keys without the layer's prefix).

    `tasks` are the tasks in the order of the checkpoint's gates. A single gate becomes `gates.shared`.

    Raises:
        ValueError: for a key that is no part of such a layer, or gates that do not match the tasks in number.
    """
    ours: dict[str, Tensor] = {}
    single: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        if match := _EXPERT.fullmatch(key):
            name = f"experts.{EXPERT_NAMES[match['name']]}.{match['kind']}"
            if match["id"] is None:
                ours[name] = tensor
            else:
                single.setdefault(name, {})[int(match["id"])] = tensor
        elif match := _GATE.fullmatch(key):
            ours[f"gates.{_task_name(match['task'], tasks)}.{match['name']}"] = tensor
        else:
            raise ValueError(
                f'"{key}" is no tensor of a published MoE layer (experts.htoh4, experts.h4toh, gate.{{t}})'
            )
    for name, parts in single.items():
        if sorted(parts) != list(range(len(parts))):
            raise ValueError(f"{name}: the checkpoint lacks some experts, it holds {sorted(parts)}")
        ours[name] = torch.cat([parts[i] for i in range(len(parts))])
    absent = [task for task in tasks if f"gates.{task}.w_gate" not in ours and "gates.shared.w_gate" not in ours]
    if absent:
        raise ValueError(f'the checkpoint has no gate for task "{absent[0]}" (number {tuple(tasks).index(absent[0])})')
    return ours


def to_published(state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """The published names for one layer's `state_dict` (keys without the layer's prefix); inverse of `from_published`.

    Raises:
        ValueError: for a tensor that the published layout has no name for, such as a cosine gate's scale.
    """
    theirs: dict[str, Tensor] = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if len(parts) == 3 and parts[0] == "experts" and parts[1] in _OUR_EXPERT_NAMES:
            theirs[f"experts.{_OUR_EXPERT_NAMES[parts[1]]}.{parts[2]}"] = tensor
        elif len(parts) == 3 and parts[0] == "gates" and parts[2] in ("w_gate", "w_noise") and parts[1] in tasks:
            theirs[f"gate.{tuple(tasks).index(parts[1])}.{parts[2]}"] = tensor
        elif len(parts) == 3 and parts[:2] == ["gates", "shared"] and parts[2] in ("w_gate", "w_noise"):
            theirs[f"gate.{parts[2]}"] = tensor
        else:
            raise ValueError(
                f'"{key}" has no name in the published layout (gates of tasks {", ".join(tasks)}, experts)'
            )
    return theirs


def join_ranks(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One state dict from the files `0.pth`, `1.pth`, ... of an expert-parallel run, in rank order.

    Tensors under `experts.` are concatenated over the experts (fastmoe gives rank r the experts r * E/R and on); all
    others are the same on every rank, or only in the first file, and are taken from there. Works on whole models.

    Raises:
        ValueError: where a rank lacks experts that the first one has, or their shapes differ beyond the first dim.
    """
    if not states:
        raise ValueError("no rank files to join")
    joined: dict[str, Tensor] = {}
    for key, tensor in states[0].items():
        if not _IS_EXPERT.search(key):
            joined[key] = tensor
            continue
        parts = [tensor]
        for rank, state in enumerate(states[1:], start=1):
            if key not in state or state[key].shape[1:] != tensor.shape[1:]:
                found = tuple(state[key].shape) if key in state else "nothing"
                raise ValueError(f"rank {rank}, {key}: found {found}, rank 0 has {tuple(tensor.shape)}")
            parts.append(state[key])
        joined[key] = torch.cat(parts)
    return joined


def split_ranks(state: Mapping[str, Tensor], num_ranks: int) -> list[dict[str, Tensor]]:
    """The state dicts of `num_ranks` expert-parallel processes, inverse of `join_ranks`: each has its share of the
    experts and all other tensors, as every process of a published run loads its own file.

    Raises:
        ValueError: experts that do not divide among the ranks.
    """
    parts: list[dict[str, Tensor]] = [{} for _ in range(num_ranks)]
    for key, tensor in state.items():
        is_expert = _IS_EXPERT.search(key) is not None
        if is_expert and tensor.shape[0] % num_ranks:
            raise ValueError(f"{key}: {tensor.shape[0]} experts do not divide among {num_ranks} ranks")
        shares = [share.clone() for share in tensor.chunk(num_ranks)] if is_expert else [tensor] * num_ranks
        for part, share in zip(parts, shares, strict=True):
            part[key] = share
    return parts


def _task_name(number: str | None, tasks: Sequence[str]) -> str:
    if number is None:
        return "shared"
    if int(number) >= len(tasks):
        raise ValueError(
            f"the checkpoint has a gate number {number}, but only {len(tasks)} tasks are named ({', '.join(tasks)}); "
            "name all tasks of the checkpoint in their order"
        )
    return tasks[int(number)]
