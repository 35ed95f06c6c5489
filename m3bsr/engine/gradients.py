"""The mean of the gradients over the processes, once a step.

Why not ``DistributedDataParallel``: frozen parameters it leaves out as we do, but gates and heads of tasks that a batch
has no labels for get no gradient, which it only bears with ``find_unused_parameters``: a walk through the whole graph
in every forward pass, and a bit map of its own to reduce. With micro-batches it must know beforehand which one is the
last. Here the gradients that are there after the last backward are reduced. What is given up is the overlap
of communication with the backward pass, which matters where all parameters train and the wire is slow.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from m3bsr.engine.distributed import meet, num_processes

BUCKET_BYTES = 32 * 2**20
"""Gradients that travel together: large enough to fill a wire, small enough to copy little at a time."""


def mean_gradients(
    parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES, group: dist.ProcessGroup | None = None
) -> None:
    """Replace every gradient by its mean over the processes; called by all, with the same parameters in the same order.

    Of a ``group`` of them only the gradients are added up, and still divided by the number of all processes: those of
    experts hold the others already (see ``engine.expert_shares``).

    A gradient that is missing counts as zero, and stays missing where all processes miss it, so that the optimizer
    leaves the parameter alone as in one process. Costs a message of one byte a parameter beside the gradients.
    Sharded parameters are left out: ``fully_shard`` reduced theirs in the backward pass.
    """
    if num_processes() == 1:
        return
    meet()
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    there = torch.tensor([p.grad is not None for p in whole], dtype=torch.uint8)
    dist.all_reduce(there, op=dist.ReduceOp.MAX, group=group)
    wanted = [p for p, used in zip(whole, there.tolist(), strict=True) if used]
    for p in wanted:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    sent = []
    for gradients in _buckets([p.grad for p in wanted if p.grad is not None], bucket_bytes):
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        sent.append((gradients, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for gradients, flat, work in sent:
        work.wait()
        parts = flat.div_(num_processes()).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def _buckets(gradients: list[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Neighbours of one type and device, at least one and not more than ``bucket_bytes`` together."""
    buckets: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        last = buckets[-1][-1] if buckets else None
        if last is None or gradient.nbytes > room or (gradient.dtype, gradient.device) != (last.dtype, last.device):
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(gradient)
        room -= gradient.nbytes
    return buckets
