"""Block selective reprogramming: the config's plan as it is (arXiv 2405.10951)."""

from __future__ import annotations

from m3bsr.methods.base import Method

BSR = Method("block selective reprogramming: the config's plan", lambda plan, depth, value: plan)
