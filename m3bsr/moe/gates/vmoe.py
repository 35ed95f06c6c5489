"""V-MoE's gate (Riquelme et al. 2021): a softmax over all experts, then top-k."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3bsr.moe import balance
from m3bsr.moe.gates.linear import check_gate, full_precision, gate_logits, gate_weight
from m3bsr.moe.routing import GateOutput, select_top_k


class VMoEGate(nn.Module):
    """`p = softmax(x W_g + eps * noise_std / E)` over all E experts; the k largest are kept.

    The weights are left as they are with `renormalize=False` (published: they sum to less than 1) or divided by their
    sum with `renormalize=True`. The noise is drawn in training only. Load is smooth with noise, counted without.
    """

    def __init__(
        self, in_dim: int, num_experts: int, top_k: int, *, noise_std: float = 0.0, renormalize: bool = True
    ) -> None:
        super().__init__()
        check_gate(num_experts, top_k, noise_std)
        self.num_experts, self.top_k, self.noise_std, self.renormalize = num_experts, top_k, noise_std, renormalize
        self.w_gate = gate_weight(in_dim, num_experts)

    def logits(self, x_TD: Tensor, window: tuple[int, int]) -> Tensor:
        """Router logits `[T, end - first]`."""
        return gate_logits(x_TD, self.w_gate, window)

    def forward(self, x_TD: Tensor, window: tuple[int, int] | None = None) -> GateOutput:
        """Route tokens `[T, D]`; a window restricts softmax, choice and balance to its experts."""
        first, end = window or (0, self.num_experts)
        noise_std = self.noise_std / self.num_experts if self.training else 0.0
        with full_precision(x_TD.device):
            clean_TE = self.logits(x_TD, (first, end))
            noisy_TE = clean_TE + torch.randn_like(clean_TE) * noise_std if noise_std > 0 else clean_TE
            local_TK = select_top_k(noisy_TE, self.top_k)
            weights_TK = torch.softmax(noisy_TE, dim=-1).gather(1, local_TK)
            if self.renormalize:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            if noise_std > 0:
                load_E = balance.noisy_load(clean_TE, noisy_TE, noise_std, self.top_k)
            else:
                load_E = balance.hard_load(local_TK, end - first)
            importance_E = balance.importance(weights_TK, local_TK, end - first)
            balance_loss = balance.cv_squared(importance_E) + balance.cv_squared(load_E)
            return GateOutput(weights_TK, local_TK + first, balance_loss, balance.z_loss(clean_TE))
