"""Expert parallelism for whole models: who holds which experts, and what that means for gradients and checkpoints.

The processes form a grid of `replica x expert`: along `expert` the experts of every MoE layer are shared out, along
`replica` the shares are repeated. Tokens are different on all of them, so that this is data parallelism for everything
but the experts. Gradients of experts come out of the backward pass summed over the `expert` dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from m3bsr.moe.experts import Experts, whole_tensor

REPLICA, EXPERT = "replica", "expert"


def check_processes(expert_parallel: int, processes: int) -> None:
    """Raise ValueError unless `expert_parallel` divides the number of processes."""
    if processes % expert_parallel:
        raise ValueError(
            f"moe.expert_parallel {expert_parallel} needs a multiple of so many processes, this run has {processes}: "
            f"start it by torchrun --nproc-per-node {expert_parallel}"
        )


def expert_mesh(expert_parallel: int, device_type: str, timeout: timedelta | None = None) -> DeviceMesh:
    """The grid `(processes / expert_parallel, expert_parallel)` over all processes; called by all of them.

    `timeout`: how long a process waits for the others of its row or column (None: torch's half hour for gloo).

    Raises:
        ValueError: the number of processes is no multiple of `expert_parallel`.
    """
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    check_processes(expert_parallel, processes)
    grid = torch.arange(processes).view(-1, expert_parallel)
    # Not init_device_mesh, which takes no timeout.
    groups = [_group(grid.t().tolist(), timeout), _group(grid.tolist(), timeout)]
    return DeviceMesh.from_group(groups, device_type, mesh=grid, mesh_dim_names=(REPLICA, EXPERT))


def _group(rows: list[list[int]], timeout: timedelta | None) -> dist.ProcessGroup:
    """This process's group, out of groups that all processes make together."""
    groups = [dist.new_group(row, timeout=timeout) for row in rows]
    (own,) = (group for group in groups if isinstance(group, dist.ProcessGroup))
    return own


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave every process of the grid its share of the experts of all MoE layers.

    The model must have the same weights on all processes and be settled in what trains; make the optimizer afterwards.

    Raises:
        ValueError: the experts of a layer do not divide among the processes, or there are none.
    """
    layers = list(_layers(model))
    if not layers:
        raise ValueError("moe.expert_parallel: the model has no experts; see moe.blocks")
    for name, experts in layers:
        try:
            experts.shard(mesh[EXPERT])
        except ValueError as error:
            raise ValueError(f"moe.expert_parallel: {name}: {error}") from None


def gather_experts(model: nn.Module) -> None:
    """All experts on every process again; called by all. Optimizers that were made before are of no use after it."""
    for _, experts in _layers(model):
        experts.unshard()


def whole_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `state_dict` without shares: what one process would have. Called by all processes."""
    return {name: whole_tensor(tensor) for name, tensor in state.items()}


def is_sharded(model: nn.Module) -> bool:
    """Whether the experts of a model are shared out."""
    return any(experts.mesh is not None for _, experts in _layers(model))


def shared_out_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that other processes do not have, by name: experts that are shared out."""
    return {
        f"{name}.{parameter_name}": parameter
        for name, experts in _layers(model)
        if experts.mesh is not None
        for parameter_name, parameter in experts.named_parameters()
    }


def _layers(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Experts))
