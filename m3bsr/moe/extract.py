"""One task's share of an MoE layer: the experts that it uses, its gate, nothing else.

Shapes: E experts, D width of what a gate reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from m3bsr.moe.routing import most_used
from m3bsr.moe.stats import loads

COLUMN_PER_EXPERT = ("w_gate", "w_noise")
COLUMN_PER_TASK = "task_code.fc1.weight"


def check_threshold(threshold: float) -> None:
    """Raise ValueError for what is no share."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a share of choices in [0, 1], got {threshold}")


def used_experts(
    counts_E: Tensor, top_k: int, threshold: float, window: tuple[int, int] | None = None, slots: bool = False
) -> tuple[int, ...]:
    """Ids of the experts that got at least `threshold` of a task's choices, and never fewer than `top_k`; sorted.

    A threshold of 0 keeps all. Experts outside of the task's window `(first, end)` are never kept: its gate has no
    say about them.

    `slots`: the gate takes one expert of each of `top_k` slots (`SlotGate`), and the place of an expert says to which
    it belongs. Then every slot keeps as many as the one that needs most, the most used first, and the ids are in the
    order that leaves each in its slot.

    Raises:
        ValueError: a threshold outside of [0, 1].
    """
    check_threshold(threshold)
    first, end = window or (0, len(counts_E))
    mine_E = counts_E[first:end]
    enough = (loads(mine_E[None])[0] >= threshold).nonzero().flatten().tolist()
    if slots:
        chosen = _by_slot(mine_E, enough, top_k)
    else:
        chosen = tuple(enough) if len(enough) >= top_k else most_used(mine_E, top_k)
    return tuple(first + expert for expert in chosen)


def _by_slot(counts_E: Tensor, enough: Sequence[int], num_slots: int) -> tuple[int, ...]:
    needed = max(1, *(sum(expert % num_slots == slot for expert in enough) for slot in range(num_slots)))
    kept = []
    for slot in range(num_slots):
        ids = range(slot, len(counts_E), num_slots)
        local = most_used(counts_E[slot::num_slots], min(needed, len(ids)))
        kept.append([ids[i] for i in local])
    groups = range(max(map(len, kept)))
    return tuple(experts[group] for group in groups for experts in kept if group < len(experts))


def keep_experts(
    state: Mapping[str, Tensor], experts: Sequence[int], task: str, tasks: Sequence[str]
) -> dict[str, Tensor]:
    """The `state_dict` of a `MoEMlp` for `tasks`, cut down to one of them and to some experts.

    The result fits a layer with `tasks=(task,)`, as many experts and no windows, and gives what the layer gave as long
    as it chose among these experts. (Gates that do not renormalise, and the slots of a `SlotGate`, take their softmax
    over fewer experts, so that the weights of the others grow.)

    Args:
        state: stacked experts, `gates.{task}.*` or `gates.shared.*`, without the layer's prefix.
        experts: ids of the experts to keep, in the order that they get.
    """
    ids = torch.tensor(tuple(experts))
    kept: dict[str, Tensor] = {}
    for key, tensor in state.items():
        part, _, name = key.partition(".")
        owner, _, rest = name.partition(".")
        where = ids.to(tensor.device)
        if part == "experts":
            kept[key] = tensor[where]
        elif part == "gates" and owner in tasks and owner != task:
            continue
        elif rest in COLUMN_PER_EXPERT:
            kept[key] = tensor[:, where]
        elif rest == COLUMN_PER_TASK:
            index = tuple(tasks).index(task)
            kept[key] = tensor[:, index : index + 1]
        else:
            kept[key] = tensor
    return kept
