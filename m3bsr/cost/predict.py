"""The cost of a training step, predicted. Nothing is computed: blocks and what stands between them have formulas
(``stages``, ``parts``), what lies behind them, decoders and losses, runs once on tensors without content (``trace``).

A step goes through its parts forward and backward. With ``L`` for what is always there (parameters, buffers, optimizer
state, inputs), its peak is the highest of

* forward, part i:  ``L + stored(parts before i) + forward_peak(i)``, and what waits to be restored,
* backward, part i: ``L + stored(parts before i) + gradients(parts behind i) + backward_peak(i)``,
* the optimizer:    ``L + gradients + temporaries`` (AdamW: three times the largest parameter).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from m3bsr.bsr.reprogram import tokens_left
from m3bsr.bsr.trainable import HEAD_PATHS
from m3bsr.cost.information import vit_of
from m3bsr.cost.parts import Precision, backbone_parts, backbone_shape, first_with_graph
from m3bsr.cost.stages import FLOAT, INDEX, Stage
from m3bsr.cost.trace import Behind, trace_behind
from m3bsr.cost.tuned import tuned_halves
from m3bsr.plan import Plan
from m3bsr.utils.lookup import lookup


def peak_above_lasting(parts: Sequence[tuple[str, Stage]]) -> tuple[int, str]:
    """Highest point of a step above what is always there, in bytes, and where it is."""
    points: list[tuple[int, str]] = [(0, "nothing")]
    stored, held, kept = 0, 0, 0
    for name, part in parts:
        if name == "behind":  # its highest point is in the losses, and autocast ends before them
            kept = 0
        points.append((stored + held + kept + part.forward_peak, f"{name}, forward"))
        if name.startswith("restore"):
            held = 0
        stored += part.stored
        held += part.held
        kept += part.kept
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
    largest_bytes: int
    """The largest parameter that trains."""
    averaged: bool = False
    """Whether a moving average of what trains is kept beside it."""

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
    def average_bytes(self) -> int:
        """A moving average of the parameters that train, if there is one."""
        return self.gradient_bytes if self.averaged else 0

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
        """Always there: parameters, buffers, optimizer state, moving average, inputs."""
        return self.parameter_bytes + self.state_bytes + self.average_bytes + self.input_bytes

    @property
    def peak(self) -> tuple[int, str]:
        """Bytes at the highest point of a step, and where that is."""
        update = self.gradient_bytes + OPTIMIZER_TEMPORARIES[self.optimizer] * self.largest_bytes
        above, where = max(peak_above_lasting(self.parts), (update, "optimizer"))
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

    What a method lets train beside the plan counts if the model has just this plan (``tuned.tuned_halves``).

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
    tuned = tuned_halves(vit, plan)
    parts = backbone_parts(shape, plan, batch_size, restored=restored, precision=precision, levels=levels, tuned=tuned)
    whole = shape.num_prefix + shape.num_patches
    left = tokens_left(plan, shape.num_patches, shape.num_prefix, shape.depth)

    def rows_behind(block: int) -> int:
        return batch_size * (shape.num_tasks if shape.fork_at is not None and block >= shape.fork_at else 1)

    features = (rows_behind(shape.depth), whole if restored else left, shape.dim)
    first = first_with_graph(plan, shape.depth, tuned)
    earlier = [(rows_behind(i), whole, shape.dim, i >= first) for i in sorted(levels)]
    graph = first < shape.depth
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
        largest_bytes=_largest(model, vit, plan, tuned),
    )


def _classifier(vit: Any, x_BND: Tensor) -> Tensor:
    logits = vit.forward_head(vit.norm(x_BND))
    return F.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def _largest(model: nn.Module, vit: VisionTransformer, plan: Plan, tuned: Collection[int]) -> int:
    """Bytes of the largest parameter that trains under the plan, and in the blocks ``tuned``."""
    frozen: set[int] = set()
    if plan.train_blocks != "all":
        trained = {id(p) for i in plan.train_blocks for p in vit.blocks[i].parameters()}
        behind = [vit.get_submodule(name) for name in HEAD_PATHS if isinstance(getattr(vit, name, None), nn.Module)]
        trained |= {id(p) for module in behind for p in module.parameters()}
        trained |= {id(p) for i in tuned for p in vit.blocks[i].parameters() if p.requires_grad}
        frozen = {id(p) for p in vit.parameters()} - trained
    return max((p.nbytes for p in model.parameters() if id(p) not in frozen), default=0)
