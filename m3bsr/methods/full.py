"""Full fine-tuning."""

from __future__ import annotations

from m3bsr.methods.base import Method
from m3bsr.plan import Plan

FULL = Method("every parameter", lambda plan, depth, value: Plan())
