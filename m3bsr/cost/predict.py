"""The cost of a training step, predicted. Nothing is computed: blocks have formulas (``stages``), and what lies behind
them, decoders and losses, runs once on tensors without content (``trace``).

A step goes through its parts forward and backward. With ``L`` for what is always there (parameters, buffers, optimizer
state, inputs), its peak is the highest of

* forward, part i:  ``L + stored(parts before i) + forward_peak(i)``, and what waits to be restored,
* backward, part i: ``L + stored(parts before i) + gradients(parts behind i) + backward_peak(i)``,
* the optimizer:    ``L + gradients + temporaries`` (AdamW: three times the largest parameter).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from m3bsr.bsr.forward import BlockRoles, block_roles, needs_match
from m3bsr.bsr.reprogram import token_counts, tokens_left
from m3bsr.bsr.selectors import SELECTORS
from m3bsr.bsr.tokens import num_kept
from m3bsr.bsr.trainable import HEAD_PATHS
from m3bsr.cost.information import vit_of
from m3bsr.cost.scratch import convolution_growth
from m3bsr.cost.stages import (
    FLOAT,
    INDEX,
    BlockShape,
    Bytes,
    Role,
    Stage,
    attention_half,
    block_shape,
    bytes_of,
    mlp_half,
)
from m3bsr.cost.trace import Behind, trace_behind
from m3bsr.plan import Plan
from m3bsr.utils.lookup import lookup

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


def backbone_parts(
    shape: BackboneShape,
    plan: Plan,
    batch_size: int,
    *,
    restored: bool = False,
    precision: Precision | None = None,
    levels: Collection[int] = (),
) -> Parts:
    """The parts of a step up to the last block, in the order in which they run.

    Args:
        restored: dropped tokens come back, as for dense tasks.
        levels: blocks whose output a decoder reads, beside the last one.

    Raises:
        ValueError: a plan that does not fit the model.
    """
    how = precision or Precision()
    size = bytes_of(plan.activation_dtype, plan.prune_rate, how.autocast, how.written_out)
    roles = block_roles(plan, shape.depth)
    tokens = token_counts(plan, shape.num_patches, shape.num_prefix, shape.depth)
    num_tokens = whole = shape.num_prefix + shape.num_patches
    kind = "class_row" if shape.has_class_token else "received"
    restored = restored or plan.restore_before is not None
    rows = batch_size
    parts: Parts = [("embedding", _embedding(shape, rows, plan.train_blocks == "all", how))]
    experts = _trained_experts(shape, plan, roles)
    for i, block in enumerate(shape.blocks):
        graph = i >= roles.first_trained
        if i == plan.restore_before and plan.drop_blocks:
            # nothing is frozen before the first trained block, so there the grid comes back without a graph
            parts.append((f"restore before {i}", _restore(shape, plan, rows, i > roles.first_trained)))
            num_tokens = whole
        aside = whole - num_tokens if plan.drop_from == "backward" else 0
        role = Role(graph, roles.trained[i], plan.recompute, num_trained_experts=experts.get(i))
        scoring = roles.scores(i)
        own = scoring and graph and plan.score_source == "own" and plan.merging in ("sum", "mean")
        part = attention_half(
            block, rows, num_tokens, role._replace(scores=kind if scoring else "none", own_scores=own), size, aside
        )
        parts.append((f"blocks.{i}.attn", part))
        if i in plan.drop_blocks:
            parts.append((f"blocks.{i}.drop", _drop(shape, plan, rows, i, num_tokens, graph, own, restored, size)))
            num_tokens = tokens[i]
            aside = whole - num_tokens if plan.drop_from == "backward" else 0
        if i == shape.fork_at:
            rows *= shape.num_tasks
        parts.append((f"blocks.{i}.mlp", mlp_half(block, rows, num_tokens, role, size, aside)))
        if i in levels and i < shape.depth - 1:
            dropped = (
                sum(b <= i for b in plan.drop_blocks) if plan.restore_before is None or i < plan.restore_before else 0
            )
            # the next block stores the same tensor as its input, unless it has no graph or packs what it stores
            shared = not dropped and i + 1 >= roles.first_trained and size.x == FLOAT
            parts.append((f"level {i}", _level(shape, rows, dropped, graph, shared)))
    if (restored or plan.drop_from == "backward") and plan.drop_blocks and plan.restore_before is None:
        parts.append(("restore", _restore(shape, plan, rows, roles.first_trained < shape.depth)))
    return parts


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
        held += moved if matches or by_key else FLOAT * dropped * shape.dim
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


def peak_above_lasting(parts: Sequence[tuple[str, Stage]], embedded: int = 0) -> tuple[int, str]:
    """Highest point of a step above what is always there, in bytes, and where it is.

    Args:
        embedded: bytes of the tokens before the first block, which live as long as the forward pass of the blocks.
    """
    points: list[tuple[int, str]] = [(0, "nothing")]
    stored, held = 0, 0
    for place, (name, part) in enumerate(parts):
        if name.startswith("restore"):
            points.append((stored + held + part.forward_peak, f"{name}, forward"))
            held = 0
        inside = embedded if place > 1 and not name.startswith("behind") else 0
        points.append((stored + held + inside + part.forward_peak, f"{name}, forward"))
        stored += part.stored
        held += part.held
    gradients = 0
    waiting = sum(part.waiting for _, part in parts)
    for name, part in reversed(parts):
        stored -= part.stored
        waiting -= part.waiting
        at_hand = 0 if name == "behind" else waiting  # what lies behind the blocks counts the gradients that it leaves
        points.append((stored + gradients + at_hand + part.backward_peak, f"{name}, backward"))
        gradients += part.gradient
    return max(points)


OPTIMIZER_COPIES = {"adamw": 2, "sgd": 1, "fused adamw": 2, "fused sgd": 1}
"""Tensors of state a parameter that trains."""
OPTIMIZER_TEMPORARIES = {"adamw": 3, "sgd": 1, "fused adamw": 0, "fused sgd": 0}
"""Tensors of the size of a parameter while it is updated. AdamW: the denominator, twice, and that of the
parameter before, which is as large among those with weight decay; SGD: the gradient with weight decay. Fused: none."""


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of one training step of ``batch_size`` samples."""

    parts: tuple[tuple[str, Stage], ...]
    """Name and cost of every part, in the order of the forward pass."""
    batch_size: int
    total_params: int
    parameter_bytes: int
    """Parameters and buffers."""
    input_bytes: int
    optimizer: str
    embedded_bytes: int
    largest_bytes: int
    """The largest parameter that trains."""

    @property
    def gradient_bytes(self) -> int:
        return sum(part.gradient for _, part in self.parts)

    @property
    def trainable_params(self) -> int:
        return self.gradient_bytes // FLOAT

    @property
    def state_bytes(self) -> int:
        """Optimizer state."""
        return OPTIMIZER_COPIES[self.optimizer] * self.gradient_bytes

    @property
    def saved_bytes(self) -> int:
        """What autograd stores at the end of the forward pass, whole batch."""
        return sum(part.stored for _, part in self.parts)

    @property
    def forward_macs(self) -> int:
        return sum(part.forward_macs for _, part in self.parts)

    @property
    def train_step_macs(self) -> int:
        """Forward and backward."""
        return sum(part.forward_macs + part.backward_macs for _, part in self.parts)

    @property
    def lasting_bytes(self) -> int:
        """Always there: parameters, buffers, optimizer state, inputs."""
        return self.parameter_bytes + self.state_bytes + self.input_bytes

    @property
    def peak(self) -> tuple[int, str]:
        """Bytes at the highest point of a step, and where that is."""
        update = self.gradient_bytes + OPTIMIZER_TEMPORARIES[self.optimizer] * self.largest_bytes
        above, where = max(peak_above_lasting(self.parts, self.embedded_bytes), (update, "optimizer"))
        return self.lasting_bytes + above, where

    @property
    def peak_bytes(self) -> int:
        return self.peak[0]

    def to_dict(self) -> dict[str, Any]:
        """The keys of a measured report (``CostReport``) that can be predicted; GMACs and saved bytes per sample."""
        return {
            "trainable_params": self.trainable_params,
            "total_params": self.total_params,
            "forward_gmacs": self.forward_macs / self.batch_size / 1e9,
            "train_step_gmacs": self.train_step_macs / self.batch_size / 1e9,
            "saved_bytes_per_sample": self.saved_bytes // self.batch_size,
            "state_bytes": self.state_bytes,
            "gradient_bytes": self.gradient_bytes,
            "predicted_peak_bytes": self.peak_bytes,
            "peak_at": self.peak[1],
        }


def predict_step(
    model: nn.Module,
    plan: Plan,
    batch_size: int,
    *,
    image_size: tuple[int, int] | None = None,
    behind: Behind | None = None,
    input_bytes: int | None = None,
    optimizer: str = "adamw",
    precision: Precision | None = None,
    restored: bool = False,
    num_tasks: int | None = None,
    levels: Collection[int] = (),
) -> Prediction:
    """Predict a training step of ``model`` under ``plan``. The model is not run and may be on the meta device.

    Args:
        model: a timm ``VisionTransformer`` or a model with one as ``.backbone``, dense or with experts.
        image_size: height and width of the images, by default the model's own.
        behind: ``behind(copy, features [rows, N, D], *levels) -> loss``: what runs behind the last block, on a copy of
            the model without content; by default timm's final norm, pooling and classifier, and cross-entropy.
        input_bytes: images and targets; by default fp32 images and int64 labels.
        optimizer: ``adamw`` or ``sgd`` (with momentum), ``fused adamw`` or ``fused sgd`` (PyTorch's fused update).
        restored: ``behind`` gets the whole grid, dropped tokens restored (dense tasks).
        num_tasks: tasks at once, by default all that the model knows; with task gates each has its own tokens.
        levels: blocks whose whole grids ``behind`` gets, too, each ``[rows, N, D]``; not the last one.

    Raises:
        ValueError: a model or block without a formula, a plan that does not fit, an unknown optimizer.
    """
    vit = vit_of(model)
    lookup(OPTIMIZER_COPIES, optimizer, "optimizer")
    height, width = image_size or vit.patch_embed.img_size
    shape = backbone_shape(vit, (height, width), num_tasks)
    parts = backbone_parts(shape, plan, batch_size, restored=restored, precision=precision, levels=levels)
    whole = shape.num_prefix + shape.num_patches
    left = tokens_left(plan, shape.num_patches, shape.num_prefix, shape.depth)

    def rows_behind(block: int) -> int:
        return batch_size * (shape.num_tasks if shape.fork_at is not None and block >= shape.fork_at else 1)

    features = (rows_behind(shape.depth), whole if restored else left, shape.dim)
    first_trained = block_roles(plan, shape.depth).first_trained
    earlier = [(rows_behind(i), whole, shape.dim, i >= first_trained) for i in sorted(levels)]
    graph = first_trained < shape.depth
    autocast = precision is not None and precision.autocast
    parts.append(("behind", trace_behind(model, behind or _classifier, features, graph, autocast, earlier)))
    tensors = [*model.parameters(), *model.buffers()]
    if input_bytes is None:
        input_bytes = batch_size * (FLOAT * 3 * height * width + INDEX)
    return Prediction(
        parts=tuple(parts),
        batch_size=batch_size,
        total_params=sum(p.numel() for p in model.parameters()),
        parameter_bytes=sum(t.nbytes for t in tensors),
        input_bytes=input_bytes,
        optimizer=optimizer,
        embedded_bytes=FLOAT * batch_size * whole * shape.dim,
        largest_bytes=_largest(model, vit, plan),
    )


def _classifier(vit: Any, x_BND: Tensor) -> Tensor:
    logits = vit.forward_head(vit.norm(x_BND))
    return F.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def _largest(model: nn.Module, vit: VisionTransformer, plan: Plan) -> int:
    """Bytes of the largest parameter that trains under the plan."""
    frozen: set[int] = set()
    if plan.train_blocks != "all":
        trained = {id(p) for i in plan.train_blocks for p in vit.blocks[i].parameters()}
        behind = [vit.get_submodule(name) for name in HEAD_PATHS if isinstance(getattr(vit, name, None), nn.Module)]
        trained |= {id(p) for module in behind for p in module.parameters()}
        frozen = {id(p) for p in vit.parameters()} - trained
    return max((p.nbytes for p in model.parameters() if id(p) not in frozen), default=0)
