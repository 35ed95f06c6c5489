"""Full fine-tuning that stores only the largest activations for the backward pass (BackRazor, NeurIPS 2022).

What is pruned and what cannot be: see ``m3bsr.bsr.storage``. Nine tenths are left out, or ``backrazor:RATE``.
"""

from __future__ import annotations

from m3bsr.methods.base import Method, share
from m3bsr.plan import Plan

PRUNE_RATE = 0.9

BACKRAZOR = Method(
    "every parameter, stored activations pruned",
    lambda plan, depth, value: Plan(prune_rate=share(value, PRUNE_RATE)),
    value="a prune rate in (0, 1)",
    check_value=lambda value: share(value, PRUNE_RATE),
)
