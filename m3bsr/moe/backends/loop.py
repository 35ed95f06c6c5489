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
    for e, (fc1, fc2) in enumerate(zip(experts.fc1, experts.fc2, strict=True)):
        token_N, choice_N = torch.where(experts_TK == e)
        h_NH = F.gelu(F.linear(x_TD[token_N], fc1.weight.to(x_TD.dtype), fc1.bias.to(x_TD.dtype)))
        out_ND = F.linear(h_NH, fc2.weight.to(x_TD.dtype), fc2.bias.to(x_TD.dtype))
        y_TD = y_TD.index_add(0, token_N, out_ND * weights_TK[token_N, choice_N, None])
    return y_TD
