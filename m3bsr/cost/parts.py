"""The parts of a training step up to the last block of a ViT: the sizes of a model, and what each part costs.

Blocks have formulas in ``stages``; here are those of what stands between them (embedding, drops, restoring, levels).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from m3bsr.bsr.forward import BlockRoles, block_roles, needs_match
from m3bsr.bsr.reprogram import token_counts
from m3bsr.bsr.restore import NEEDS
from m3bsr.bsr.selectors import SELECTORS
from m3bsr.bsr.tokens import num_kept
from m3bsr.cost.halves import attention_half, mlp_half
from m3bsr.cost.scratch import convolution_growth
from m3bsr.cost.stages import FLOAT, INDEX, BlockShape, Bytes, Role, Stage, Tuned, block_shape, bytes_of
from m3bsr.cost.tuned import Halves
from m3bsr.plan import Plan

Parts = list[tuple[str, Stage]]


@dataclass(frozen=True)
class BackboneShape:
    """All that the formulas need to know of a ViT."""

    blocks: tuple[BlockShape, ...]
    num_patches: int
    num_prefix: int
    has_class_token: bool
    image_size: tuple[int, int]
    patch_weight: tuple[int, ...]
    """Shape of the patch embedding's weight."""
    embedding_params: int
    """All parameters before the first block."""
    fork_at: int | None = None
    """First block whose experts depend on the task: from its MLP on there is a row per image and task."""
    num_tasks: int = 1

    @property
    def patch_params(self) -> int:
        return math.prod(self.patch_weight)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def dim(self) -> int:
        return self.blocks[0].dim


def backbone_shape(
    vit: VisionTransformer, image_size: tuple[int, int] | None = None, num_tasks: int | None = None
) -> BackboneShape:
    """Read the sizes of ``vit``.

    Args:
        image_size: of the images it will see (default: its own).
        num_tasks: that it will be asked for at once (default: all that it knows).

    Raises:
        ValueError: a block without a formula.
    """
    num_tasks = len(getattr(vit, "tasks", ("task",))) if num_tasks is None else num_tasks
    height, width = image_size or vit.patch_embed.img_size
    shapes = tuple(block_shape(block) for block in vit.blocks)
    blocks: list[Any] = list(vit.blocks)
    forks = [i for i, block in enumerate(blocks) if getattr(block.mlp, "task_dependent", False)]
    behind = ("blocks.", "norm.", "fc_norm.", "head.", "head_dist.", "attn_pool.", "bsr_adapters.")
    return BackboneShape(
        shapes,
        math.prod(vit.patch_embed.dynamic_feat_size((height, width))),
        vit.num_prefix_tokens,
        vit.has_class_token,
        (height, width),
        tuple(vit.patch_embed.proj.weight.shape),
        sum(p.numel() for name, p in vit.named_parameters() if not name.startswith(behind)),
        forks[0] if forks and num_tasks > 1 else None,
        num_tasks,
    )


@dataclass(frozen=True)
class Precision:
    """How a step computes: ``autocast`` to 16 bits, and up to how many tokens attention is then written out (CPU)."""

    autocast: bool = False
    written_out: int = 0
    device: str = "cpu"
    """Kind of device, for the scratch space of its libraries."""
    threads: int = field(default_factory=torch.get_num_threads)


def backbone_parts(
    shape: BackboneShape,
    plan: Plan,
    batch_size: int,
    *,
    restored: bool = False,
    precision: Precision | None = None,
    levels: Collection[int] = (),
    tuned: Mapping[int, Halves] | None = None,
) -> Parts:
    """The parts of a step up to the last block, in the order in which they run.

    Args:
        restored: dropped tokens come back, as for dense tasks.
        levels: blocks whose output a decoder reads, beside the last one.
        tuned: what trains of blocks that the plan freezes (``tuned.tuned_halves``).

    Raises:
        ValueError: a plan that does not fit the model.
    """
    how = precision or Precision()
    scratch = {"pad_rows": 16 if how.autocast else 1, "threads": how.threads} if how.device == "cpu" else {}
    rates = [0.0 if block.num_experts else plan.prune_rate for block in shape.blocks]  # experts are never pruned
    sizes = [bytes_of(plan.activation_dtype, r, how.autocast, written_out=how.written_out, **scratch) for r in rates]
    roles = block_roles(plan, shape.depth)
    tokens = token_counts(plan, shape.num_patches, shape.num_prefix, shape.depth)
    num_tokens = whole = shape.num_prefix + shape.num_patches
    kind = "class_row" if shape.has_class_token else "received"
    restored = restored or plan.restore_before is not None
    rows = batch_size
    parts: Parts = [("embedding", _embedding(shape, rows, plan.train_blocks == "all", how))]
    experts = _trained_experts(shape, plan, roles)
    tuned = tuned or {}
    first = first_with_graph(plan, shape.depth, tuned)
    for i, block in enumerate(shape.blocks):
        size, (attention, mlp) = sizes[i], tuned.get(i, (Tuned(), Tuned()))
        graph = i > first or roles.trained[i] or attention.params > 0
        if i == plan.restore_before and plan.drop_blocks:
            # nothing is frozen before the first trained block, so there the grid comes back without a graph
            parts.append((f"restore before {i}", _restore(shape, plan, rows, i > first)))
            num_tokens = whole
        aside = whole - num_tokens if plan.drop_from == "backward" else 0
        role = Role(graph, roles.trained[i], plan.recompute, tuned=attention, entered=i > first)
        scoring = roles.scores(i)
        own = scoring and graph and plan.score_source == "own" and plan.merging in ("sum", "mean")
        part = attention_half(
            block, rows, num_tokens, role._replace(scores=kind if scoring else "none", own_scores=own), size, aside
        )
        if i == 0 and (size.x != FLOAT or not part.stored or role.begins_inside):  # else its input is stored
            part = part._replace(kept=part.kept + FLOAT * rows * num_tokens * shape.dim)
        parts.append((f"blocks.{i}.attn", part))
        if i in plan.drop_blocks:
            parts.append((f"blocks.{i}.drop", _drop(shape, plan, rows, i, num_tokens, graph, own, restored, size)))
            num_tokens = tokens[i]
            aside = whole - num_tokens if plan.drop_from == "backward" else 0
        if i == shape.fork_at:
            rows *= shape.num_tasks
        role = Role(i >= first, roles.trained[i], plan.recompute, "none", False, experts.get(i), mlp, graph)
        parts.append((f"blocks.{i}.mlp", mlp_half(block, rows, num_tokens, role, size, aside)))
        if i in levels and i < shape.depth - 1:
            dropped = (
                sum(b <= i for b in plan.drop_blocks) if plan.restore_before is None or i < plan.restore_before else 0
            )
            # the next block stores the same tensor as its input, unless it has no graph or packs what it stores
            stores = i >= first or (i + 1 == first and (roles.trained[first] or tuned[first][0].norm))
            shared = not dropped and stores and sizes[i + 1].x == FLOAT
            parts.append((f"level {i}", _level(shape, rows, dropped, i >= first, shared)))
    if (restored or plan.drop_from == "backward") and plan.drop_blocks and plan.restore_before is None:
        parts.append(("restore", _restore(shape, plan, rows, first < shape.depth)))
    return parts


def first_with_graph(plan: Plan, depth: int, tuned: Mapping[int, Halves]) -> int:
    """Index of the first block with anything that trains, ``depth`` if there is none."""
    return min(block_roles(plan, depth).first_trained, *tuned, depth)


def _embedding(shape: BackboneShape, rows: int, trained: bool, how: Precision) -> Stage:
    """Patches, prefix tokens before them, positions added to both; the convolution with the library's scratch space.

    Trained under autocast it stores images and weight in 16 bits."""
    patches, tokens = rows * shape.num_patches, rows * (shape.num_patches + shape.num_prefix)
    macs = patches * shape.patch_params
    growth = convolution_growth(shape.patch_weight, shape.image_size, how.device, how.autocast)
    forward, backward = (one + (rows - 1) * more for one, more in growth)
    channels, height, width = shape.patch_weight[1], *shape.image_size
    stored = 2 * (rows * channels * height * width + shape.patch_params) if trained and how.autocast else 0
    gradient = FLOAT * shape.embedding_params if trained else 0
    # by the time of the convolution the gradients of positions and prefix tokens are there
    others = gradient - FLOAT * shape.patch_params + FLOAT * shape.dim * (tokens + patches)
    return Stage(
        stored,
        round(max(forward, stored + FLOAT * shape.dim * (patches + 2 * tokens))),
        round(stored + others + backward) if trained else 0,
        gradient,
        macs,
        macs if trained else 0,
    )


def _drop(
    shape: BackboneShape,
    plan: Plan,
    rows: int,
    block: int,
    num_tokens: int,
    graph: bool,
    own: bool,
    restored: bool,
    size: Bytes,
) -> Stage:
    """Kept and dropped tokens gathered by index; with "own" scores the dropped ones are stored for the scores."""
    inner, heads = shape.blocks[block].inner, shape.blocks[block].heads
    ordinary = num_tokens - shape.num_prefix
    kept = num_kept(plan.keep_rates[block], ordinary)
    moved = FLOAT * rows * ordinary * shape.dim
    dropped = rows * (ordinary - kept)
    stored = rows * ordinary * INDEX + (dropped * (size.act * shape.dim + FLOAT) if own else 0) if graph else 0
    held = rows * ordinary * (INDEX + FLOAT)
    matches, by_key = needs_match(plan, restored), SELECTORS[plan.select].needs_keys
    if plan.drop_from == "backward":
        held += FLOAT * dropped * shape.dim
    elif restored:
        remembered = {"dropped": dropped, "kept": rows * kept}
        held += FLOAT * shape.dim * sum(remembered[which] for which in NEEDS[plan.restore])
    if graph and plan.merging == "merge":  # shares of the mean, and what goes where
        stored += rows * ordinary * FLOAT + dropped * INDEX
    # keys are compared between dropped and kept tokens, and between all
    macs = dropped * kept * (inner // heads) if matches or (by_key and plan.drop_from == "both") else 0
    macs += rows * ordinary * ordinary * (inner // heads) if by_key else 0
    # before and behind the drop; backward: a gradient of the whole list for kept and for dropped tokens
    peak = round(stored + 3 * moved)
    return Stage(round(stored), peak, peak if graph else 0, forward_macs=macs, held=held)


def _restore(shape: BackboneShape, plan: Plan, rows: int, graph: bool) -> Stage:
    moved = FLOAT * rows * shape.num_patches * shape.dim
    indices = rows * shape.num_patches * INDEX * len(plan.drop_blocks)
    gradient = FLOAT * 2 * shape.dim * len(plan.drop_blocks) if plan.restore == "adapt" else 0
    stored = indices if graph else 0
    return Stage(stored, stored + 3 * moved, stored + 3 * moved if graph else 0, gradient)


def _level(shape: BackboneShape, rows: int, dropped: int, graph: bool, shared: bool) -> Stage:
    """The whole grid behind a block, for a decoder that stores it; with drops in force a copy with all tokens."""
    whole = FLOAT * rows * (shape.num_patches + shape.num_prefix) * shape.dim
    stored = (0 if shared else whole) + (rows * shape.num_patches * INDEX * dropped if graph else 0)
    return Stage(
        stored, stored + (2 * whole if dropped else 0), stored + whole if graph else 0, waiting=whole if graph else 0
    )


def _trained_experts(shape: BackboneShape, plan: Plan, roles: BlockRoles) -> dict[int, int]:
    """How many experts train in each trained MoE block, where not all do."""
    blocks = [i for i, block in enumerate(shape.blocks) if block.num_experts and roles.trained[i]]
    if plan.train_experts == "all":
        return {}
    if isinstance(plan.train_experts, str):  # "top:n"
        return dict.fromkeys(blocks, int(plan.train_experts.partition(":")[2]))
    return {i: len(experts) for i, experts in zip(blocks, plan.train_experts, strict=False)}
