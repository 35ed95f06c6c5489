"""Expert parallelism of a run: gradients, their norm and checkpoints where each process holds a share of the experts.

Everything but the experts is data-parallel. The gradient of an expert comes out of the backward pass summed over the
processes that share the experts, as the tokens of all of them went through it; that of everything else is the
process's own. Checkpoints are those of one process, so they can be resumed with any number of processes and shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import get_total_norm

from m3bsr.engine.distributed import is_main, num_processes, patience, together
from m3bsr.engine.gradients import mean_gradients
from m3bsr.moe.parallel import (
    EXPERT,
    REPLICA,
    expert_mesh,
    gather_experts,
    shard_experts,
    shared_out_parameters,
    whole_state,
)


class ExpertShares:
    """Shares the experts of a model out among `expert_parallel` processes, until :meth:`gather`.

    With 1 nothing is shared out, and everything is as without this class.

    Args:
        model: the same on all processes, settled in what trains, on its device.
        optimizer: over the trained parameters of the whole model, without state yet, its groups with ``param_names``.
            It keeps those that stay here.

    Raises:
        ValueError: the number of processes or of experts does not fit, or there are no experts.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, expert_parallel: int) -> None:
        self.model = model
        self.mesh: DeviceMesh | None = None
        self.optimizer: Any = optimizer
        """State of the whole optimizer, to and from what is here; ``state_dict`` is called by all."""
        self._elsewhere: set[str] = set()
        if expert_parallel == 1:
            return
        self.mesh = expert_mesh(expert_parallel, next(model.parameters()).device.type, patience())
        whole = [list(group["param_names"]) for group in optimizer.param_groups]
        with together():
            shard_experts(model, self.mesh)
        self._elsewhere = {*shared_out_parameters(model)}
        here = {id(parameter) for parameter in model.parameters()}
        for group in optimizer.param_groups:
            kept = [i for i, parameter in enumerate(group["params"]) if id(parameter) in here]
            for name in ("params", "param_names"):
                group[name] = [group[name][i] for i in kept]
        is_first = self.mesh[REPLICA].get_local_rank() == 0
        self.optimizer = _WholeOptimizer(optimizer, whole, sent=self._elsewhere if is_first else set())

    def to_save(self) -> tuple[Any, Any]:
        """Model and optimizer as a checkpoint takes them: whole, put together by all processes, who all call this."""
        if self.mesh is None:
            return self.model, self.optimizer
        return _Taken(whole_state(self.model.state_dict())), _Taken(self.optimizer.state_dict())

    def mean_gradients(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Every gradient becomes that of the mean loss of all processes; called by all."""
        everywhere, experts = self._parted(trained)
        mean_gradients(everywhere)
        if self.mesh is not None:
            mean_gradients(experts, group=self.mesh[REPLICA].get_group())

    def total_norm(self, trained: Mapping[str, nn.Parameter]) -> Tensor:
        """The norm of all gradients, of experts on other processes as well; called by all."""
        everywhere, experts = self._parted(trained)
        norm = _norm(everywhere)
        if self.mesh is None:
            return norm
        squares = _norm(experts).to(norm).square()
        dist.all_reduce(squares, group=self.mesh[EXPERT].get_group())
        return (norm.square() + squares).sqrt()

    def gather(self) -> None:
        """All experts on all processes again; called by all. The optimizer is of no more use then."""
        gather_experts(self.model)

    def _parted(self, trained: Mapping[str, nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters that all processes have, and experts."""
        experts = [parameter for name, parameter in trained.items() if name in self._elsewhere]
        return [parameter for name, parameter in trained.items() if name not in self._elsewhere], experts


class _Taken:
    """A state that was taken already, of which nothing is spread out."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def parameters(self) -> tuple[()]:
        return ()


class _WholeOptimizer:
    """An optimizer whose ``state_dict``, on process 0, is that of one process alone; on others it has no state.

    Args:
        param_names: of each group, for the whole model.
        sent: names of the parameters whose state this process contributes.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, param_names: list[list[str]], sent: set[str]) -> None:
        self.optimizer, self.param_names, self.sent = optimizer, param_names, sent

    @property
    def state(self) -> Any:
        """Of the parameters that are here."""
        return self.optimizer.state

    def state_dict(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        by_name = _by_name(state)
        parts: list[Any] | None = [None] * num_processes() if is_main() else None
        mine = {name: _on_cpu(values) for name, values in by_name.items() if name in self.sent}
        dist.gather_object(mine, parts)
        for part in parts or []:
            by_name |= {name: values for name, values in part.items() if name not in by_name}
        return _numbered(state["param_groups"], self.param_names, by_name if is_main() else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        here = [group["param_names"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(_numbered(state["param_groups"], here, _by_name(state)))


def _by_name(state: Mapping[str, Any]) -> dict[str, Any]:
    numbers = [pair for g in state["param_groups"] for pair in zip(g["param_names"], g["params"], strict=True)]
    return {name: state["state"][number] for name, number in numbers if number in state["state"]}


def _numbered(groups: Iterable[Any], names: list[list[str]], by_name: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's ``state_dict`` for other parameters of the same groups."""
    numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
    return {
        "state": {numbers[name]: values for name, values in by_name.items() if name in numbers},
        "param_groups": [
            {**group, "params": [numbers[name] for name in own], "param_names": list(own)}
            for group, own in zip(groups, names, strict=True)
        ],
    }


def _on_cpu(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}


def _norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    return get_total_norm([p.grad for p in parameters if p.grad is not None])
