"""Losses that keep a router balanced, as pure functions.

`balance_loss = cv^2(importance) + cv^2(load)` (Shazeer et al. 2017, eq. 6-11; Riquelme et al. 2021, appendix A), and
the router z-loss of ST-MoE (Zoph et al. 2022, eq. 5). Shapes: T tokens, K choices, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3bsr.moe.routing import count_experts


def cv_squared(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation, `var / (mean^2 + 1e-10)`; 0 for a single value.

    The variance is the unbiased one (divided by E - 1), as in the published M3ViT and fastmoe code.
    """
    if values_E.numel() < 2:
        return values_E.sum() * 0.0
    return values_E.var() / (values_E.mean() ** 2 + 1e-10)


def importance(weights_TK: Tensor, experts_TK: Tensor, num_experts: int) -> Tensor:
    """Sum of the gate weights that each expert received: `[E]`, differentiable in the weights."""
    # Through a dense [T, E] matrix: a row holds an expert once, so no float is summed in an undefined order.
    dense_TE = weights_TK.new_zeros(weights_TK.shape[0], num_experts).scatter(1, experts_TK, weights_TK)
    return dense_TE.sum(0)


def hard_load(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Number of tokens that each expert serves: float `[E]`, without gradient."""
    return count_experts(experts_TK.reshape(1, -1), num_experts)[0].float()


def noisy_load(clean_TE: Tensor, noisy_TE: Tensor, noise_std_TE: Tensor | float, top_k: int) -> Tensor:
    """Expected number of tokens of each expert if its own noise were drawn anew: `[E]`, differentiable.

    `P(x, i) = Phi((clean_i - threshold_i) / std_i)`, where `threshold_i` is the top_k-th largest noisy logit among the
    other experts: the (top_k + 1)-th of all where expert i is in, the top_k-th where it is out. Logits are compared
    with logits. (The published code compares clean logits with noisy ones after a softmax.)
    """
    num_experts = clean_TE.shape[-1]
    if top_k >= num_experts:
        return clean_TE.new_full((num_experts,), float(clean_TE.shape[0]))
    best = torch.topk(noisy_TE, top_k + 1, dim=-1).values
    enters, leaves = best[:, top_k - 1 : top_k], best[:, top_k : top_k + 1]
    threshold_TE = torch.where(noisy_TE > leaves, leaves, enters)
    z_TE = (clean_TE - threshold_TE) / noise_std_TE
    return (0.5 * (1.0 + torch.erf(z_TE / math.sqrt(2.0)))).sum(0)


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the router logits, which keeps them small; 0 without tokens."""
    return torch.logsumexp(logits_TE, dim=-1).square().sum() / max(logits_TE.shape[0], 1)
