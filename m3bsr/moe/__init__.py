"""Mixture of experts: gates, routing, experts and the ways to run them. `MoEMlp` is the layer."""

from __future__ import annotations

from m3bsr.moe.gates import GATES
from m3bsr.moe.moe_mlp import MoEMlp
from m3bsr.moe.routing import Routing, most_used
from m3bsr.moe.upcycle import tie_gate_columns, upcycle_mlp

__all__ = ["GATES", "MoEMlp", "Routing", "most_used", "tie_gate_columns", "upcycle_mlp"]
