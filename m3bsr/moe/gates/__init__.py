"""Gates: one file and one line here each.

A gate is built as `Gate(in_dim, num_experts, top_k, *, noise_std=0.0, renormalize=True)`, holds its weight as
`w_gate [in_dim, num_experts]` and is called with tokens `[T, in_dim]` and, optionally, a window `(first, end)` of
experts; it returns a `GateOutput`. It must run in float32 whatever autocast says, and must keep nothing on itself.
"""

from __future__ import annotations

from torch import nn

from m3bsr.moe.gates.cosine import CosineGate
from m3bsr.moe.gates.noisy_topk import NoisyTopKGate
from m3bsr.moe.gates.slots import SlotGate
from m3bsr.moe.gates.vmoe import VMoEGate

GATES: dict[str, type[nn.Module]] = {
    "noisy_topk": NoisyTopKGate,
    "vmoe": VMoEGate,
    "cosine": CosineGate,
    "slots": SlotGate,
}
