"""The oracle: each expert picks its tokens, plain autograd. Slow, and obviously right; for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bsr.moe.experts import Experts


def missing() -> str | None:
    return None


def why_not(device: torch.device, dtype: torch.dtype, experts: Experts) -> str | None:
    return None


def run(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, experts: Experts) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    fc1, fc2 = experts.fc1, experts.fc2
    params = zip(fc1.weights, fc1.biases, fc2.weights, fc2.biases, strict=True)
    for e, expert in enumerate(params):
        w1, b1, w2, b2 = (p.to(x_TD.dtype) for p in expert)
        token_N, choice_N = torch.where(experts_TK == e)
        out_ND = F.linear(F.gelu(F.linear(x_TD[token_N], w1, b1)), w2, b2)
        y_TD = y_TD.index_add(0, token_N, out_ND * weights_TK[token_N, choice_N, None])
    return y_TD
