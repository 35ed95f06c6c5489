"""The heads alone, on frozen features (linear probing): no graph in the backbone at all."""

from __future__ import annotations

from m3bsr.methods.base import FROZEN, Method

HEAD = Method("heads only", lambda plan, depth, value: FROZEN)
