"""The experts of one layer: one pair of Linears each in memory, one stacked tensor per kind in a checkpoint.

Separate parameters are the truth because freezing must be exact: in one stacked parameter a frozen expert still pays
for its gradient and optimizer state, and AdamW still moves it (momentum and decay do not need a gradient).

Of several processes each may hold a share of the experts only (`m3bsr.moe.parallel`). Ids, and with them the names of
parameters, are those of the whole layer on every process, and so is `state_dict`: its tensors are then `DTensor`s,
`Shard(0)`, of the shape of the whole.
Shapes: E experts, D embed_dim, H hidden_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


class ExpertLinears(nn.ModuleList):
    """E Linears whose `state_dict` holds `weight [E, out, in]` and `bias [E, out]` instead of `0.weight`, `1.weight`...

    Loading takes the stacked names (or, for what an older tool may have written, the separate ones).
    """

    def __init__(self, num_experts: int, in_dim: int, out_dim: int) -> None:
        super().__init__(nn.Linear(in_dim, out_dim) for _ in range(num_experts))
        self.num_experts = num_experts
        self.mesh: DeviceMesh | None = None
        for weight, bias in zip(self.weights, self.biases, strict=True):
            nn.init.trunc_normal_(weight, std=0.02)
            nn.init.zeros_(bias)
        self.register_state_dict_post_hook(_stack)
        self.register_load_state_dict_pre_hook(_unstack)

    def __getitem__(self, expert: int) -> nn.Linear:  # type: ignore[override]
        """An expert by its id; KeyError for one that another process holds."""
        return cast(nn.Linear, self._modules[str(expert)])

    @property
    def held(self) -> range:
        """Ids of the experts that are here."""
        if self.mesh is None:
            return range(self.num_experts)
        share = self.num_experts // self.mesh.size()
        return range(self.mesh.get_local_rank() * share, (self.mesh.get_local_rank() + 1) * share)

    def shard(self, mesh: DeviceMesh) -> None:
        """Let go of the experts that are not this process's share."""
        self.mesh = mesh
        for expert in {*range(self.num_experts)} - {*self.held}:
            del self._modules[str(expert)]

    def unshard(self) -> None:
        """Take up all experts again, with the weights that the processes have now; called by all of them."""
        if self.mesh is None:
            return
        state = {name: whole_tensor(tensor) for name, tensor in self.state_dict().items()}
        first = self[self.held[0]]
        linears = {str(e): self._modules.get(str(e)) for e in range(self.num_experts)}
        self._modules.clear()
        for name, linear in linears.items():
            self.add_module(name, linear or nn.Linear(first.in_features, first.out_features).to(first.weight))
        self.mesh = None
        self.load_state_dict(state)

    @property
    def weights(self) -> list[Tensor]:
        """The weights `[out, in]` of the experts that are here."""
        return [cast(Tensor, linear.weight) for linear in self]

    @property
    def biases(self) -> list[Tensor]:
        """The biases `[out]` of the experts that are here."""
        return [cast(Tensor, linear.bias) for linear in self]


class Experts(nn.Module):
    """E GELU MLPs `D -> H -> D`: `fc1`, `fc2`."""

    def __init__(self, num_experts: int, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.num_experts, self.embed_dim, self.hidden_dim = num_experts, embed_dim, hidden_dim
        self.fc1 = ExpertLinears(num_experts, embed_dim, hidden_dim)
        self.fc2 = ExpertLinears(num_experts, hidden_dim, embed_dim)
        self._trained: tuple[int, ...] | None = None  # on all processes, where only a share is here

    @property
    def held(self) -> range:
        """Ids of the experts that are here: all, or this process's share."""
        return self.fc1.held

    @property
    def mesh(self) -> DeviceMesh | None:
        """The processes that share the experts; None where all are here."""
        return self.fc1.mesh

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep only this process's share of the experts; every process of the 1-D `mesh` must do the same.

        What is trained must be settled, and the weights equal on all of them.

        Raises:
            ValueError: the experts do not divide among the processes.
        """
        assert self.mesh is None and mesh.ndim == 1
        if self.num_experts % mesh.size():
            raise ValueError(f"{self.num_experts} experts do not divide among {mesh.size()} processes")
        self._trained = self.trainable()
        self.fc1.shard(mesh)
        self.fc2.shard(mesh)

    def unshard(self) -> None:
        """Inverse of `shard`, with the present weights; called by all processes, nothing to do where all are here."""
        trained = self._trained
        self.fc1.unshard()
        self.fc2.unshard()
        if trained is not None:
            self._trained = None
            self.set_trainable(trained)

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
            for i in linears.held:
                linears[i].requires_grad_(i in ids)
        if self.mesh is not None:
            self._trained = tuple(sorted(ids))

    def trainable(self) -> tuple[int, ...]:
        """Ids of the experts that are here with at least one parameter that trains."""
        return tuple(
            e for e in self.held if any(p.requires_grad for fc in (self.fc1, self.fc2) for p in fc[e].parameters())
        )

    @property
    def any_trains(self) -> bool:
        """Whether some expert of the layer trains, here or on another process."""
        return bool(self.trainable() if self._trained is None else self._trained)

    def extra_repr(self) -> str:
        here = "" if self.mesh is None else f", {self.held[0]} to {self.held[-1]} here"
        return f"{self.num_experts} x ({self.embed_dim} -> {self.hidden_dim} -> {self.embed_dim}){here}"


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which the processes hold shares (called by all of them); others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _stack(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _local_metadata: Any) -> None:
    """Replace the children's entries by stacked ones. Runs right after they were written, so the order is kept."""
    assert isinstance(module, ExpertLinears)
    for name in ("weight", "bias"):
        stacked = torch.stack([state_dict.pop(f"{prefix}{e}.{name}") for e in module.held])
        if module.mesh is not None:
            stacked = DTensor.from_local(stacked, module.mesh, [Shard(0)], run_check=False)
        state_dict[prefix + name] = stacked


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
    held = module.held
    for name in ("weight", "bias"):
        own = [getattr(linear, name) for linear in module]
        keys = [f"{prefix}{e}.{name}" for e in range(module.num_experts)]
        wanted = (module.num_experts, *own[0].shape)
        stacked = state_dict.pop(prefix + name, None)
        if stacked is None and any(key in state_dict for key in keys):
            for expert in {*range(module.num_experts)} - {*held}:
                state_dict.pop(keys[expert], None)
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
            own = [part.clone() if assign else part for part in _share(stacked, module).unbind()]
        # Where nothing fits, every expert "loads" itself, so that the children add no messages of their own.
        state_dict.update(zip(keys[held.start : held.stop], own, strict=True))


def _share(stacked: Tensor, module: ExpertLinears) -> Tensor:
    """The slice of a stacked tensor, whole or shared out, that a process holds."""
    if isinstance(stacked, DTensor) and stacked.device_mesh == module.mesh and stacked.placements == (Shard(0),):
        return stacked.to_local()
    return whole_tensor(stacked)[module.held.start : module.held.stop]
