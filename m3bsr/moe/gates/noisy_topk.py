"""Noisy top-k gating (Shazeer et al. 2017, "Outrageously Large Neural Networks", eq. 3-5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3bsr.moe import balance
from m3bsr.moe.gates.linear import check_gate, full_precision, gate_logits, gate_weight
from m3bsr.moe.routing import GateOutput, select_top_k

MIN_STD = 1e-2


class NoisyTopKGate(nn.Module):
    """`logits = x W_g + eps * (softplus(x W_n) + 1e-2)` in training; top-k, then a softmax over the k.

    The noise learns its own size (`w_noise` starts at zero: std .70), so `noise_std` does not apply. The weights
    sum to 1 whatever `renormalize` says. The same gate without noise is `vmoe` with `renormalize=True`.

    Raises:
        ValueError: for a `noise_std` other than 0.
    """

    def __init__(
        self, in_dim: int, num_experts: int, top_k: int, *, noise_std: float = 0.0, renormalize: bool = True
    ) -> None:
        super().__init__()
        check_gate(num_experts, top_k, noise_std)
        if noise_std != 0:
            raise ValueError(f"gate noisy_topk learns its noise: noise_std must stay 0, got {noise_std}")
        self.num_experts, self.top_k, self.renormalize = num_experts, top_k, True
        self.w_gate = gate_weight(in_dim, num_experts)
        self.w_noise = nn.Parameter(torch.zeros(in_dim, num_experts))

    def forward(self, x_TD: Tensor, window: tuple[int, int] | None = None) -> GateOutput:
        """Route tokens `[T, D]`; a window restricts choice and balance to its experts."""
        first, end = window or (0, self.num_experts)
        with full_precision(x_TD.device):
            clean_TE = gate_logits(x_TD, self.w_gate, (first, end))
            noisy_TE = clean_TE
            if self.training:
                noise_std_TE = F.softplus(gate_logits(x_TD, self.w_noise, (first, end))) + MIN_STD
                noisy_TE = clean_TE + torch.randn_like(clean_TE) * noise_std_TE
            local_TK = select_top_k(noisy_TE, self.top_k)
            weights_TK = torch.softmax(noisy_TE.gather(1, local_TK), dim=-1)
            if self.training:
                load_E = balance.noisy_load(clean_TE, noisy_TE, noise_std_TE, self.top_k)
            else:
                load_E = balance.hard_load(local_TK, end - first)
            importance_E = balance.importance(weights_TK, local_TK, end - first)
            balance_loss = balance.cv_squared(importance_E) + balance.cv_squared(load_E)
            return GateOutput(weights_TK, local_TK + first, balance_loss, balance.z_loss(clean_TE))
