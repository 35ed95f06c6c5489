"""A cosine gate (Chi et al. 2022, "On the Representation Collapse of Sparse Mixture of Experts"; Swin-MoE uses one)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3bsr.moe.gates.linear import router_dtype
from m3bsr.moe.gates.vmoe import VMoEGate

INITIAL_SCALE = 3.0
MAX_SCALE = 100.0


class CosineGate(VMoEGate):
    """`p = softmax(s * cos(x, W_g) + eps * noise_std / E)`, then as `vmoe`; `s` is learned, from 3 up to 100.

    The token's length does not count, which matters most where the gate reads tokens that no LayerNorm has seen
    (`gate_input_BND` before attention).
    """

    def __init__(
        self, in_dim: int, num_experts: int, top_k: int, *, noise_std: float = 0.0, renormalize: bool = True
    ) -> None:
        super().__init__(in_dim, num_experts, top_k, noise_std=noise_std, renormalize=renormalize)
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    def logits(self, x_TD: Tensor, window: tuple[int, int]) -> Tensor:
        """Scaled cosines `[T, end - first]`, at most `MAX_SCALE` in size."""
        dtype = router_dtype(x_TD)
        w_DE = F.normalize(self.w_gate[:, window[0] : window[1]].to(dtype), dim=0)
        scale = self.log_scale.to(dtype).clamp(max=math.log(MAX_SCALE)).exp()
        return F.normalize(x_TD.to(dtype), dim=-1) @ w_DE * scale
