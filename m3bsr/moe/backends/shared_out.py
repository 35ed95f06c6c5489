"""Experts that several processes share: rows travel to the processes that hold their experts, and back.

Every process sorts its rows by expert, tells the others how many come, and sends them; the receiver runs any backend
on what arrived, which sorts it by its own experts; the results go back the way they came and are summed with the gate
weights where the token lives. An expert sees the same rows in the same order as in one process that has the tokens of
all, process after process, so that results and gradients are the same numbers.

All processes must call this equally often, with no tokens too: both exchanges wait for everyone, forward and backward.
Shapes: T tokens, K choices, E experts of the layer, R rows sent, N rows received, D embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from m3bsr.moe.backends.grouped import combine_rows, gather_rows
from m3bsr.moe.dispatch import plan_dispatch
from m3bsr.moe.experts import Experts


def run_shared_out(
    x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, experts: Experts, run: Callable[..., Tensor]
) -> Tensor:
    """As a backend's `run`, for experts that are shared out; `run` is the backend for those that are here."""
    assert experts.mesh is not None
    group, here = experts.mesh.get_group(), len(experts.held)
    plan = plan_dispatch(experts_TK, experts.num_experts)
    sent_E = torch.tensor(plan.counts, device=x_TD.device)
    received_E = torch.empty_like(sent_E)  # process after process, each its rows for the experts here
    dist.all_to_all_single(received_E, sent_E, group=group)
    send = [sum(plan.counts[first : first + here]) for first in range(0, experts.num_experts, here)]
    receive = received_E.view(-1, here).sum(1).tolist()
    ids_N = torch.arange(here, device=x_TD.device).repeat(len(receive)).repeat_interleave(received_E)

    x_ND = exchange(gather_rows(x_TD, plan), send, receive, group)
    y_ND = run(x_ND, x_ND.new_ones(len(ids_N), 1), ids_N[:, None], experts)
    # Where no expert here trains, others may: then all take part in the exchange of the gradients.
    y_RD = exchange(y_ND, receive, send, group, needs_grad=experts.any_trains)
    return combine_rows(y_RD, weights_TK, plan)


def exchange(
    rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup, needs_grad: bool = False
) -> Tensor:
    """Send `send[p]` consecutive rows to each process p of the group and get `receive[p]`; gradients go back.

    `needs_grad` makes this process take part in the backward pass even if its own rows need no gradient.
    """
    anchor = torch.zeros((), device=rows.device, requires_grad=True) if needs_grad else None
    return _Exchange.apply(rows, anchor, tuple(send), tuple(receive), group)


class _Exchange(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        anchor: Tensor | None,
        send: tuple[int, ...],
        receive: tuple[int, ...],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        grad_rows = _all_to_all(grad, ctx.receive, ctx.send, ctx.group)
        return grad_rows if ctx.needs_input_grad[0] else None, None, None, None, None


def _all_to_all(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
    return received
