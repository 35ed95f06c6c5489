"""The experts of one layer: one pair of Linears each in memory, one stacked tensor per kind in a checkpoint.

Separate parameters are the truth because freezing must be exact: in one stacked parameter a frozen expert still pays
for its gradient and optimizer state, and AdamW still moves it (momentum and decay do not need a gradient).
Shapes: E experts, D embed_dim, H hidden_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


class ExpertLinears(nn.ModuleList):
    """E Linears whose `state_dict` holds `weight [E, out, in]` and `bias [E, out]` instead of `0.weight`, `1.weight`...

    Loading takes the stacked names (or, for what an older tool may have written, the separate ones).
    """

    def __init__(self, num_experts: int, in_dim: int, out_dim: int) -> None:
        super().__init__(nn.Linear(in_dim, out_dim) for _ in range(num_experts))
        for weight, bias in zip(self.weights, self.biases, strict=True):
            nn.init.trunc_normal_(weight, std=0.02)
            nn.init.zeros_(bias)
        self.register_state_dict_post_hook(_stack)
        self.register_load_state_dict_pre_hook(_unstack)

    @property
    def weights(self) -> list[Tensor]:
        """The weights `[out, in]` of all experts."""
        return [cast(Tensor, linear.weight) for linear in self]

    @property
    def biases(self) -> list[Tensor]:
        """The biases `[out]` of all experts."""
        return [cast(Tensor, linear.bias) for linear in self]


class Experts(nn.Module):
    """E GELU MLPs `D -> H -> D`: `fc1`, `fc2`."""

    def __init__(self, num_experts: int, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.num_experts, self.embed_dim, self.hidden_dim = num_experts, embed_dim, hidden_dim
        self.fc1 = ExpertLinears(num_experts, embed_dim, hidden_dim)
        self.fc2 = ExpertLinears(num_experts, hidden_dim, embed_dim)

    def set_trainable(self, ids: Sequence[int] | str) -> None:
        """Train exactly these experts (`"all"`, or ids; `()` freezes all).

        Raises:
            ValueError: for an id out of range or given twice.
        """
        if isinstance(ids, str):
            if ids != "all":
                raise ValueError(f'trainable experts must be "all" or a tuple of ids, got "{ids}"')
            ids = range(self.num_experts)
        wrong = [i for i in ids if not 0 <= i < self.num_experts]
        if wrong or len(set(ids)) != len(ids):
            raise ValueError(f"trainable experts must be distinct ids in 0..{self.num_experts - 1}, got {tuple(ids)}")
        for linears in (self.fc1, self.fc2):
            for i, linear in enumerate(linears):
                linear.requires_grad_(i in ids)

    def trainable(self) -> tuple[int, ...]:
        """Ids of the experts with at least one parameter that trains."""
        pairs = zip(self.fc1, self.fc2, strict=True)
        return tuple(i for i, pair in enumerate(pairs) if any(p.requires_grad for m in pair for p in m.parameters()))

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.embed_dim} -> {self.hidden_dim} -> {self.embed_dim})"


def _stack(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _local_metadata: Any) -> None:
    """Replace the children's entries by stacked ones. Runs right after they were written, so the order is kept."""
    assert isinstance(module, ExpertLinears)
    for name in ("weight", "bias"):
        state_dict[prefix + name] = torch.stack([state_dict.pop(f"{prefix}{e}.{name}") for e in range(len(module))])


def _unstack(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    _strict: bool,
    missing_keys: list[str],
    _unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Hand every expert its slice of the stacked tensor; one message, not 2E, for a tensor that is missing or wrong."""
    assert isinstance(module, ExpertLinears)
    for name in ("weight", "bias"):
        own = [getattr(linear, name) for linear in module]
        keys = [f"{prefix}{e}.{name}" for e in range(len(module))]
        wanted = (len(module), *own[0].shape)
        stacked = state_dict.pop(prefix + name, None)
        if stacked is None and any(key in state_dict for key in keys):
            continue
        if stacked is None:
            missing_keys.append(prefix + name)
        elif tuple(stacked.shape) != wanted:
            error_msgs.append(
                f"{prefix}{name}: the checkpoint holds experts of shape {tuple(stacked.shape)}, the model {wanted} "
                "(experts, out, in); check num_experts, embed_dim and moe mlp_ratio"
            )
        else:
            # With assign=True the slices become the parameters: give each its own memory, not a view of the stack.
            assign = local_metadata.get("assign_to_params_buffers", False)
            own = [part.clone() if assign else part for part in stacked.unbind()]
        # Where nothing fits, every expert "loads" itself, so that the children add no messages of their own.
        state_dict.update(zip(keys, own, strict=True))
