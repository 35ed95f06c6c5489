"""Models that do not fit into one process: parameters, gradients and optimizer state spread out by FSDP2.

On disk each process has safetensors files of its own, written and read by ``torch.distributed.checkpoint``; any number
of processes can read them, one without a process group too, and nothing is pickled.
"""

from __future__ import annotations

import re
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.futures import Future

from m3bsr.bsr.storage import call
from m3bsr.engine.distributed import is_joined, meet, num_processes


def shard(model: nn.Module) -> None:
    """Spread all parameters, frozen ones too, over the processes; before the optimizer is made. Alone: nothing.

    A block's weights are gathered for each of its halves, a head's for the head, and given up afterwards; the rest
    (embedding, norms) stays gathered during a pass. Gradients are reduced in the backward pass, of every micro-batch.

    Args:
        model: a ``MultiTaskModel``.
    """
    if num_processes() == 1:
        return
    for block in model.get_submodule("backbone.blocks").children():
        fully_shard(block)
        # Our forward pass goes through the parts of a block and never calls the block itself.
        block.run_half = types.MethodType(_run_half, block)  # type: ignore[assignment]
        register_fsdp_forward_method(block, "run_half")
    for head in model.get_submodule("heads").children():
        fully_shard(head)
    fully_shard(model)


def _run_half(block: nn.Module, *args: Any) -> Any:
    return call(*args)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread out; called by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, spread out as ``like`` is; as it is if it is so already."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class _Writer(HuggingFaceStorageWriter):
    """Notes when this process has written its part: those who wait for the others can then name who has not."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        finally:
            meet()


def write_shards(folder: Path, model: nn.Module, optimizer: Any = None) -> None:
    """Write this process's part of parameters, buffers and optimizer state; called by all processes.

    Raises:
        OSError: on all of them, if one cannot write.
    """
    tensors = {**_tensors(model), **(_slots(model, optimizer) if optimizer is not None else {})}
    try:
        dcp.save(tensors, storage_writer=_Writer(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise OSError(f"could not write {folder}: {next(iter(error.failures.values()))[0]}") from None


def read_shards(folder: Path, model: nn.Module, optimizer: Any = None) -> None:
    """Read what :func:`write_shards` wrote, whatever the numbers of processes then and now; called by all.

    Raises:
        ValueError: of another model.
    """
    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    own = _tensors(model)
    for name, tensor in own.items():
        found = getattr(saved.get(name), "size", None)
        if found is None or found != tensor.shape:
            there = "is missing there" if found is None else f"is {list(found)} there"
            raise ValueError(f"{folder.parent} is of another model: {name} {there}, {list(tensor.shape)} in the model")
    slots: dict[str, Tensor] = {}
    if optimizer is not None:
        parameters = dict(model.named_parameters())
        for key in saved:
            name, _, slot = key.removeprefix(SLOTS).rpartition("/")
            if key.startswith(SLOTS) and name in parameters:  # some experts may be on other processes
                size = saved[key].size  # type: ignore[union-attr]
                like = parameters[name]
                slots[key] = torch.zeros_like(like) if size == like.shape and size else torch.zeros(size)
                optimizer.state[like][slot] = slots[key]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is meant to be
        dcp.load({**own, **slots}, storage_reader=reader, no_dist=not is_joined())


SLOTS = "optimizer/"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    # Not state_dict(): its hooks stack the experts, which here lie on several processes.
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _slots(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """``optimizer/NAME/SLOT`` of what the optimizer keeps of each parameter."""
    return {
        f"{SLOTS}{name}/{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_whole(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Load a whole state dict into a model that is spread out; experts are stacked in it (``moe.experts``)."""
    with torch.no_grad():
        for name, own in _tensors(model).items():
            stacked, expert = re.sub(r"\.(\d+)(\.\w+)$", r"\2", name), re.search(r"\.(\d+)\.\w+$", name)
            value = saved[name] if name in saved or expert is None else saved[stacked][int(expert[1])]
            own.copy_(spread(value, own))
