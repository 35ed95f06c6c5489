"""The cost of a training step, predicted: formulas of ``stages`` summed over a model under a plan, nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from m3bsr.bsr.forward import block_roles
from m3bsr.bsr.reprogram import token_counts
from m3bsr.cost.stages import BlockShape, Role, Stage, attention_half, block_shape, mlp_half
from m3bsr.plan import Plan


@dataclass(frozen=True)
class BackboneShape:
    """All that the formulas need to know of a ViT."""

    blocks: tuple[BlockShape, ...]
    num_patches: int
    num_prefix: int
    has_class_token: bool
    fork_at: int | None = None
    """First block whose experts depend on the task: from its MLP on there is a row per image and task."""
    num_tasks: int = 1

    @property
    def depth(self) -> int:
        return len(self.blocks)


def backbone_shape(vit: VisionTransformer, num_patches: int | None = None) -> BackboneShape:
    """Read the sizes of ``vit``; ``num_patches`` (default: its own) is that of the images it will see.

    Raises:
        ValueError: a block without a formula.
    """
    tasks: Sequence[str] = getattr(vit, "tasks", ("task",))
    blocks: list[Any] = list(vit.blocks)
    forks = [i for i, block in enumerate(blocks) if getattr(block.mlp, "task_dependent", False)]
    return BackboneShape(
        tuple(block_shape(block) for block in blocks),
        vit.patch_embed.num_patches if num_patches is None else num_patches,
        vit.num_prefix_tokens,
        vit.has_class_token,
        forks[0] if forks and len(tasks) > 1 else None,
        len(tasks),
    )


def block_stages(shape: BackboneShape, plan: Plan, batch_size: int) -> list[Stage]:
    """Two stages a block, attention then MLP, in the order in which they run.

    Raises:
        ValueError: a plan that does not fit the model.
    """
    roles = block_roles(plan, shape.depth)
    tokens = token_counts(plan, shape.num_patches, shape.num_prefix, shape.depth)
    whole = shape.num_prefix + shape.num_patches
    kind = "class_row" if shape.has_class_token else "received"
    stages, rows, num_tokens = [], batch_size, whole
    for i, block in enumerate(shape.blocks):
        if i == plan.restore_before:
            num_tokens = whole
        graph = i >= roles.first_trained
        role = Role(graph, roles.trained[i], plan.recompute)
        scores = kind if roles.scores(i) else "none"
        stages.append(attention_half(block, rows, num_tokens, role._replace(scores=scores)))
        num_tokens = tokens[i]
        if i == shape.fork_at:
            rows *= shape.num_tasks
        stages.append(mlp_half(block, rows, num_tokens, role))
    return stages


def peak_above_lasting(stages: Sequence[Stage]) -> int:
    """Highest point of a step above what is always there (parameters, optimizer state, inputs), in bytes."""
    stored, peak = 0, 0
    for stage in stages:
        peak = max(peak, stored + stage.forward_peak)
        stored += stage.stored
    gradients = 0
    for stage in reversed(stages):
        stored -= stage.stored
        peak = max(peak, stored + gradients + stage.backward_peak)
        gradients += stage.gradient
    return peak
