"""What a training step holds beside activations: parameters, gradients, optimizer state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class ParameterCost:
    """Numbers of parameters, and bytes. A tensor that is shared counts once."""

    trainable: int
    total: int
    parameter_bytes: int
    """Parameters and buffers."""
    gradient_bytes: int
    """Of all parameters that train, whether or not a gradient is there right now."""


def parameter_cost(model: nn.Module) -> ParameterCost:
    parameters = _unique(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return ParameterCost(
        trainable=sum(p.numel() for p in trained),
        total=sum(p.numel() for p in parameters),
        parameter_bytes=storage_bytes([*parameters, *model.buffers()]),
        gradient_bytes=sum(p.nbytes for p in trained),
    )


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state as it is now; most optimizers make it in their first step."""
    return storage_bytes(optimizer_tensors(optimizer))


def optimizer_tensors(optimizer: Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]


def storage_bytes(tensors: Iterable[Tensor], device: torch.device | None = None) -> int:
    """Bytes of the storages behind the tensors, each storage once; with `device`, only those on it."""
    storages = {}
    for tensor in tensors:
        if device is None or tensor.device == device:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters}.values())
