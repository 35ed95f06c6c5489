"""The whole layer as one Function that keeps only its inputs and the choices, and computes the rest again.

Saved: tokens `[T, D]`, weights `[T, K]`, the plan. `grouped` keeps 2 (D + H) numbers for each of T * K rows instead.
The price is one more fc1 GEMM (1/6 of the layer) and a second gather and GELU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from m3bsr.moe.backends.grouped import linear_rows, linear_rows_backward, pad_rows, row_dots, sum_rows
from m3bsr.moe.dispatch import Dispatch, plan_dispatch
from m3bsr.moe.experts import Experts


def missing() -> str | None:
    return None


def why_not(device: torch.device, dtype: torch.dtype, experts: Experts) -> str | None:
    return None


def run(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, experts: Experts) -> Tensor:
    plan = plan_dispatch(experts_TK, len(experts.held), pad_rows=pad_rows(x_TD))
    params = [*experts.fc1.weights, *experts.fc1.biases, *experts.fc2.weights, *experts.fc2.biases]
    return _WholeLayer.apply(x_TD, weights_TK, plan, *params)


def _quarters(items: Any, num_experts: int) -> tuple[Any, Any, Any, Any]:
    w1, b1, w2, b2 = (items[i * num_experts : (i + 1) * num_experts] for i in range(4))
    return w1, b1, w2, b2


class _WholeLayer(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, plan: Dispatch, *params: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(x_TD, weights_TK, *params)
        w1, b1, w2, b2 = _quarters([p.to(x_TD.dtype) for p in params], len(plan.spans))
        h_RH = F.gelu(linear_rows(x_TD.index_select(0, plan.tokens_R), w1, b1, plan))
        return sum_rows(linear_rows(h_RH, w2, b2, plan), plan, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        plan: Dispatch = ctx.plan
        x_TD, weights_TK, *params = ctx.saved_tensors
        # Under autocast the copies in its type are made again: kept, they would be half as large as the experts.
        w1, b1, w2, b2 = _quarters([p.to(x_TD.dtype) for p in params], len(plan.spans))
        need_x, need_gate = ctx.needs_input_grad[:2]
        need_w1, need_b1, need_w2, need_b2 = _quarters(ctx.needs_input_grad[3:], len(plan.spans))
        below = [need_x or w or b for w, b in zip(need_w1, need_b1, strict=True)]

        x_RD = x_TD.index_select(0, plan.tokens_R)
        u_RH = linear_rows(x_RD, w1, b1, plan)
        h_RH = F.gelu(u_RH)
        # Rows carry the weighted gradient from here on; the gate's gradient needs the one before the weights.
        grad_y_RD = grad_TD.index_select(0, plan.tokens_R)
        grad_weights_TK = None
        if need_gate:
            # <g, y> without computing y: y = W2 h + b2, so <g, y> = <g W2, h> + <g, b2>.
            back_RH = linear_rows_backward(grad_y_RD, w2, plan, [True] * len(w2))
            dots_R = row_dots(back_RH, h_RH)
            for (first, end), bias in zip(plan.spans, b2, strict=True):
                dots_R[first:end] += grad_y_RD[first:end] @ bias
            grad_weights_TK = dots_R[plan.row_TK]
        row_weights_R1 = plan.row_weights(weights_TK)[:, None]
        grad_y_RD.mul_(row_weights_R1)
        grad_w2, grad_b2 = _param_grads(grad_y_RD, h_RH, w2, plan, need_w2, need_b2)
        grad_w1: list[Tensor | None] = [None] * len(w1)
        grad_b1: list[Tensor | None] = [None] * len(b1)
        grad_x_TD = None
        if any(below):
            back_RH = back_RH.mul_(row_weights_R1) if need_gate else linear_rows_backward(grad_y_RD, w2, plan, below)
            grad_u_RH = torch.ops.aten.gelu_backward(back_RH, u_RH)
            grad_w1, grad_b1 = _param_grads(grad_u_RH, x_RD, w1, plan, need_w1, need_b1)
            if need_x:
                grad_x_TD = sum_rows(linear_rows_backward(grad_u_RH, w1, plan, [True] * len(w1)), plan)
        grads = (*grad_w1, *grad_b1, *grad_w2, *grad_b2)
        own_dtype = (g if g is None else g.to(p.dtype) for g, p in zip(grads, params, strict=True))
        return grad_x_TD, grad_weights_TK, None, *own_dtype


def _param_grads(
    grad_RO: Tensor, x_RI: Tensor, weights: Any, plan: Dispatch, need_w: Any, need_b: Any
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Weight and bias gradients of the trained experts; zeros for one without tokens."""
    grad_w: list[Tensor | None] = []
    grad_b: list[Tensor | None] = []
    for (first, end), weight, w, b in zip(plan.spans, weights, need_w, need_b, strict=True):
        rows = grad_RO[first:end]
        grad_w.append(None if not w else rows.t() @ x_RI[first:end] if end > first else torch.zeros_like(weight))
        grad_b.append(rows.sum(0) if b else None)
    return grad_w, grad_b
