"""`torch.nn.functional.grouped_mm`: one kernel for all experts, without a host synchronisation on Hopper and newer.

`auto` takes it only for bf16 on CUDA devices of compute capability 9.x and 10.x: elsewhere torch runs the same loop as
`grouped`, with a synchronisation per call. What has to be guarded, found by running it:
- fp64 is refused; rows must be a multiple of 16 bytes; autocast does not know the function (casts are explicit);
- backward refuses expanded gradients, and rows beyond the last offset are uninitialised (there are none here);
- on some devices the weight gradient of an expert without tokens is not zero (pytorch issue 172439): it is masked.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from m3bsr.moe.backends.grouped import combine_rows, gather_rows
from m3bsr.moe.dispatch import Dispatch, plan_dispatch
from m3bsr.moe.experts import ExpertLinears, Experts


def missing() -> str | None:
    return None if hasattr(F, "grouped_mm") else f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"


def why_not(device: torch.device, dtype: torch.dtype, experts: Experts) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"grouped_mm does not compute in {dtype}"
    for name, width in (("embed_dim", experts.embed_dim), ("hidden_dim", experts.hidden_dim)):
        if width * dtype.itemsize % 16:
            return f"grouped_mm needs rows of a multiple of 16 bytes, {name}={width} in {dtype} is not"
    return None


def is_fast(device: torch.device, dtype: torch.dtype, experts: Experts) -> bool:
    """Whether `auto` should take it: torch's own kernel exists, and all experts train or none does."""
    if device.type != "cuda" or dtype != torch.bfloat16 or missing() or why_not(device, dtype, experts):
        return False
    uniform = len(experts.trainable()) in (0, len(experts.held))
    return uniform and torch.cuda.get_device_capability(device)[0] in (9, 10)


def run(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, experts: Experts) -> Tensor:
    # Trained experts first: two slabs, and the frozen one asks for no weight gradient.
    trained = tuple(e - experts.held.start for e in experts.trainable())
    order = trained + tuple(e for e in range(len(experts.held)) if e not in trained)
    rank_E = torch.empty(len(order), dtype=torch.int64)
    rank_E[list(order)] = torch.arange(len(order))
    plan = plan_dispatch(rank_E.to(experts_TK.device)[experts_TK], len(order))
    x_RD = gather_rows(x_TD, plan)
    parts = []
    for first, end in ((0, len(trained)), (len(trained), len(order))):
        if first < end:
            rows = slice(plan.spans[first][0], plan.spans[end - 1][1])
            parts.append(_slab(x_RD[rows], plan, order[first:end], first, experts))
    y_RD = torch.cat(parts) if len(parts) > 1 else parts[0]
    return combine_rows(y_RD, weights_TK, plan)


def _slab(x_RD: Tensor, plan: Dispatch, ids: tuple[int, ...], first: int, experts: Experts) -> Tensor:
    counts_E = torch.tensor(plan.counts[first : first + len(ids)], device=x_RD.device)
    h_RH = F.gelu(_linear(x_RD, counts_E, ids, experts.fc1))
    return _linear(h_RH, counts_E, ids, experts.fc2)


def _linear(x_RI: Tensor, counts_E: Tensor, ids: tuple[int, ...], linears: ExpertLinears) -> Tensor:
    weights, biases = linears.weights, linears.biases
    if x_RI.shape[0] == 0:  # grouped_mm refuses no rows at all; a trained expert still gets its zero gradient
        touched = torch.stack([weights[e].sum() + biases[e].sum() for e in ids]).sum() * 0
        return x_RI.new_zeros(0, weights[ids[0]].shape[0]) + (touched.to(x_RI.dtype) + x_RI.sum())
    weight_EOI = torch.stack([weights[e] for e in ids]).to(x_RI.dtype)
    bias_EO = torch.stack([biases[e] for e in ids]).to(x_RI.dtype)
    weight_EOI = _MaskEmpty.apply(weight_EOI, counts_E)
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    y_RO = F.grouped_mm(x_RI.contiguous(), weight_EOI.transpose(1, 2), offs=offsets_E)
    y_RO = y_RO + bias_EO.repeat_interleave(counts_E, dim=0, output_size=x_RI.shape[0])
    return _ContiguousGrad.apply(y_RO)


class _MaskEmpty(Function):
    """Identity; the gradient of experts without tokens becomes zero, whatever the kernel left there."""

    @staticmethod
    def forward(ctx: Any, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(counts_E)
        return weight_EOI.view_as(weight_EOI)

    @staticmethod
    def backward(ctx: Any, grad_EOI: Tensor) -> tuple[Tensor, None]:
        (counts_E,) = ctx.saved_tensors
        return torch.where(counts_E[:, None, None] > 0, grad_EOI, torch.zeros_like(grad_EOI)), None


class _ContiguousGrad(Function):
    """Identity; the gradient is made contiguous (`y.sum().backward()` brings an expanded one)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
