"""The last blocks and the heads."""

from __future__ import annotations

from m3bsr.methods.base import Method, positive
from m3bsr.plan import Plan


def _plan(plan: Plan, depth: int, value: str) -> Plan:
    num = positive(value)
    if num > depth:
        raise ValueError(f"model.method last:{num}: the model has {depth} blocks")
    return Plan(train_blocks=tuple(range(depth - num, depth)))


LAST = Method("the last blocks and the heads", _plan, value="the number of blocks", check_value=positive)
