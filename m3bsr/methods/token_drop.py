"""Token dropping alone (EViT, ICLR 2022): every parameter trains, unimportant tokens are dropped on the way.

Where and how much is what the config's plan says; one that drops nothing gets EViT's: after a quarter, half and three
quarters of the blocks, keep rate .7. ``token_drop:.5`` sets the keep rate. The dropping block scores for itself.
"""

from __future__ import annotations

import dataclasses

from m3bsr.methods.base import Method, share
from m3bsr.plan import Plan

KEEP_RATE = 0.7


def _plan(plan: Plan, depth: int, value: str) -> Plan:
    if not plan.drop_blocks:
        blocks = tuple(sorted({depth * part // 4 for part in (1, 2, 3)} - {depth - 1}))
        plan = dataclasses.replace(plan, drop_blocks=blocks, keep_rate=KEEP_RATE, restore_before=None)
    if value:
        plan = dataclasses.replace(plan, keep_rate=share(value, KEEP_RATE))
    everything = {name: getattr(Plan(), name) for name in ("train_blocks", "train_experts")}
    as_computed = {name: getattr(Plan(), name) for name in ("recompute", "activation_dtype", "prune_rate")}
    return dataclasses.replace(plan, **everything, **as_computed, score_source="own")


TOKEN_DROP = Method(
    "every parameter, tokens dropped as in EViT",
    _plan,
    value="a keep rate in (0, 1)",
    check_value=lambda value: share(value, KEEP_RATE),
)
