"""BitFit: biases of the blocks and the heads (Ben Zaken et al., ACL 2022).

All biases: of Linears, of norms, of every expert. Not of the patch embedding, so that the graph starts at the first
block. A frozen Linear does not store its input; a norm does, and GELU and attention do.
"""

from __future__ import annotations

from m3bsr.methods.base import FROZEN, Method, train_parameters
from m3bsr.models import MultiTaskModel


def _change(model: MultiTaskModel, value: str) -> None:
    train_parameters(model.backbone.blocks, lambda name: name == "bias")


BITFIT = Method("biases of the blocks and the heads", lambda plan, depth, value: FROZEN, _change, lr_scale=10.0)
