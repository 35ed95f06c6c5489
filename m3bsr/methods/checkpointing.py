"""Full fine-tuning with blocks computed again in the backward pass (Chen et al., 2016): exact, slower, small.

Both halves of a block are stretches of their own: of a block its input and the input of its MLP are stored.
"""

from __future__ import annotations

from m3bsr.methods.base import Method
from m3bsr.plan import Plan

CHECKPOINTING = Method("every parameter, blocks recomputed", lambda plan, depth, value: Plan(recompute="all"))
