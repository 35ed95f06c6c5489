"""A gate for experts that are slices of one MLP: it chooses one expert for every slice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3bsr.moe import balance
from m3bsr.moe.gates.linear import check_gate, full_precision, gate_logits, gate_weight
from m3bsr.moe.routing import GateOutput


class SlotGate(nn.Module):
    """The experts `j, j + K, j + 2K, ...` form slot `j` of K = top_k; every token takes the best expert of each slot.

    Splitting a dense MLP into S slices puts slice `e % S` into expert `e`. A free top-k over all experts serves many
    tokens one slice twice and another not at all, from the first step in which the columns of the gate part; with K a
    multiple of S this gate cannot: whatever it chooses is a complete MLP. `p = softmax(x W_g + eps * noise_std / E)`
    within each slot, over K so that it sums to about K / E in the beginning, as V-MoE's does; then as `vmoe`.
    """

    def __init__(
        self, in_dim: int, num_experts: int, top_k: int, *, noise_std: float = 0.0, renormalize: bool = True
    ) -> None:
        super().__init__()
        check_gate(num_experts, top_k, noise_std)
        self.num_experts, self.top_k, self.noise_std, self.renormalize = num_experts, top_k, noise_std, renormalize
        self.w_gate = gate_weight(in_dim, num_experts)

    def forward(self, x_TD: Tensor, window: tuple[int, int] | None = None) -> GateOutput:
        """Route tokens `[T, D]`; in a window the slots are counted from its first expert."""
        first, end = window or (0, self.num_experts)
        noise_std = self.noise_std / self.num_experts if self.training else 0.0
        with full_precision(x_TD.device):
            clean_TE = gate_logits(x_TD, self.w_gate, (first, end))
            noisy_TE = clean_TE + torch.randn_like(clean_TE) * noise_std if noise_std > 0 else clean_TE
            clean_TGK, noisy_TGK = (self._slots(logits_TE) for logits_TE in (clean_TE, noisy_TE))
            # stable: of equal logits the lower expert wins, everywhere
            best_TK = torch.sort(noisy_TGK.detach(), dim=1, descending=True, stable=True).indices[:, 0]
            p_TK = noisy_TGK.softmax(dim=1).gather(1, best_TK.unsqueeze(1)).squeeze(1) / self.top_k
            weights_TK, order_TK = p_TK.sort(dim=1, descending=True, stable=True)
            slot_K = torch.arange(self.top_k, device=x_TD.device)
            local_TK = (best_TK * self.top_k + slot_K).gather(1, order_TK)
            if self.renormalize:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            if noise_std > 0:
                per_slot = zip(clean_TGK.unbind(2), noisy_TGK.unbind(2), strict=True)
                loads_GK = torch.stack([balance.noisy_load(c, n, noise_std, 1) for c, n in per_slot], dim=1)
                load_E = loads_GK.flatten()[: end - first]
            else:
                load_E = balance.hard_load(local_TK, end - first)
            importance_E = balance.importance(weights_TK, local_TK, end - first)
            balance_loss = balance.cv_squared(importance_E) + balance.cv_squared(load_E)
            return GateOutput(weights_TK, local_TK + first, balance_loss, balance.z_loss(clean_TE))

    def _slots(self, logits_TE: Tensor) -> Tensor:
        """`[T, E] -> [T, G, K]`, slots last; -inf where the last experts do not fill all of them."""
        missing = -logits_TE.shape[1] % self.top_k
        return F.pad(logits_TE, (0, missing), value=float("-inf")).unflatten(1, (-1, self.top_k))
