"""The frozen prefix of a model: what lies before the first block that trains gives the same tokens at every step.

So its tokens may be computed once and kept (``m3bsr.engine.prefix_cache``). Here is which blocks that are, and what has
to be kept: not the tokens alone, also their scores and, where the prefix drops some, what was dropped and where.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from timm.layers import DropPath, PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from m3bsr.bsr.selectors import SELECTORS
from m3bsr.bsr.tokens import TokenState
from m3bsr.plan import Plan

# Everything else that a VisionTransformer holds takes part in the embedding.
BEHIND_EMBEDDING = ("blocks", "norm", "fc_norm", "head", "head_dist", "head_drop", "attn_pool", "bsr_adapters")


class Prefix(NamedTuple):
    """Tokens behind the first ``num_blocks`` blocks."""

    state: TokenState
    num_blocks: int


def frozen_prefix(model: VisionTransformer, plan: Plan) -> tuple[int, str]:
    """How many leading blocks give the same in every training step, and what ends them, in words.

    The prefix ends before a block that trains (any parameter of it, adapters of a method included), is random in
    training, holds experts, comes behind a restored grid, drops at random, or by a keep rate that changes with the
    steps. Blocks that drop by a fixed rate belong to it. With 0 blocks there is nothing to keep.
    """
    embedding = [m for name, m in model.named_children() if name not in BEHIND_EMBEDDING]
    parameters = [p for name, p in model.named_parameters() if name.partition(".")[0] not in BEHIND_EMBEDDING]
    if any(p.requires_grad for p in parameters):
        return 0, "the patch embedding trains"
    if any(map(_is_random, embedding)):
        return 0, "the embedding is random in training"
    for i, block in enumerate(model.blocks):
        if any(p.requires_grad for p in block.parameters()):
            return i, f"block {i} trains"
        if i in getattr(model, "moe_blocks", ()):
            return i, f"block {i} has experts"
        if _is_random(block):
            return i, f"block {i} is random in training (stochastic depth or dropout)"
        if i == plan.restore_before:
            return i, f"the grid is restored before block {i}"
        if i in plan.drop_blocks and SELECTORS[plan.select].is_random:
            return i, f"block {i} drops tokens at random"
        if i in plan.drop_blocks and plan.schedule != "constant":
            return i, f"the keep rate of block {i} changes with the steps"
    return len(model.blocks), "no block trains"


def prefix_weights(model: VisionTransformer, num_blocks: int) -> dict[str, Tensor]:
    """Every parameter and buffer that the tokens behind ``num_blocks`` blocks depend on, by name."""
    first = tuple(f"blocks.{i}." for i in range(num_blocks))
    state = model.state_dict()
    return {k: v for k, v in state.items() if k.startswith(first) or k.partition(".")[0] not in BEHIND_EMBEDDING}


def state_tensors(state: TokenState) -> dict[str, Tensor]:
    """Every tensor of a state by name, the batch first, but for undone drops; :func:`with_tensors` puts them back."""
    tensors = {name: value for name, value in vars(state).items() if isinstance(value, Tensor)}
    for i, stage in enumerate(state.stages):
        tensors |= {f"stages.{i}.{name}": value for name, value in vars(stage).items() if isinstance(value, Tensor)}
    return tensors


def with_tensors(state: TokenState, tensors: Mapping[str, Tensor]) -> TokenState:
    """``state`` with other tensors in the places that :func:`state_tensors` names."""
    stages = []
    for i, stage in enumerate(state.stages):
        start = f"stages.{i}."
        own: dict[str, Any] = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        stages.append(dataclasses.replace(stage, **own))
    rest: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if not name.startswith("stages.")}
    return dataclasses.replace(state, stages=tuple(stages), **rest)


def _is_random(module: nn.Module) -> bool:
    return any(_rate(part) > 0 for part in module.modules())


def _rate(module: nn.Module) -> float:
    if isinstance(module, _DropoutNd):
        return module.p
    if isinstance(module, DropPath):
        return module.drop_prob or 0.0
    return module.prob if isinstance(module, PatchDropout) else 0.0
