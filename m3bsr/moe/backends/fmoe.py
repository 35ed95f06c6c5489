"""fastmoe's CUDA kernel for the experts' GEMMs (optional extra `fmoe`; the import is lazy).

Written after reading fastmoe 1.1: `fmoe.linear.MOELinear.apply(rows, counts, weight [E, out, in], bias [E, out])` with
the counts as int64 on the CPU. Its backward computes all weight gradients, so frozen experts are refused.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bsr.moe.backends.grouped import combine_rows, gather_rows
from m3bsr.moe.dispatch import plan_dispatch
from m3bsr.moe.experts import Experts


def missing() -> str | None:
    if importlib.util.find_spec("fmoe") is None:
        return "fastmoe is not installed (build it from https://github.com/laekov/fastmoe, needs CUDA)"
    try:
        importlib.import_module("fmoe.linear")
    except (ImportError, OSError) as error:  # it imports its CUDA part, which may be missing or for another torch
        return f"fastmoe does not load: {error}"
    return None


def why_not(device: torch.device, dtype: torch.dtype, experts: Experts) -> str | None:
    if device.type != "cuda":
        return f"fastmoe has CUDA kernels only, the tokens are on {device.type}"
    if len(experts.trainable()) not in (0, len(experts.held)):
        return "fastmoe computes every weight gradient, and some experts are frozen; use grouped"
    return None


def run(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, experts: Experts) -> Tensor:
    linear = importlib.import_module("fmoe.linear").MOELinear.apply
    plan = plan_dispatch(experts_TK, len(experts.held))
    counts_E = torch.tensor(plan.counts, dtype=torch.int64)
    w1, b1, w2, b2 = (
        torch.stack(params).to(x_TD.dtype)
        for params in (experts.fc1.weights, experts.fc1.biases, experts.fc2.weights, experts.fc2.biases)
    )
    h_RH = F.gelu(linear(gather_rows(x_TD, plan), counts_E, w1, b1))
    return combine_rows(linear(h_RH, counts_E, w2, b2), weights_TK, plan)
