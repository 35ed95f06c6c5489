"""A backbone and a head per task. Tasks are known by name only.

Shapes: B images, N tokens, C channels of a task, D embedding width, h x w patches, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from m3bsr.backbones import BackboneOutput, TaskViTMixin
from m3bsr.bsr import DropStage, Prefix
from m3bsr.heads import ClassifierHead, CrossTaskRefinement, DenseHead
from m3bsr.moe import Routing


@dataclass(frozen=True)
class ModelOutput:
    """Predictions and what the report and the auxiliary losses need of the way to them."""

    predictions: dict[str, Tensor]
    """Raw head outputs per task: ``[B, C, H, W]``, of classifiers ``[B, C]``."""
    balance_loss: Tensor
    z_loss: Tensor
    routing: dict[int, Routing]
    stages: dict[str, tuple[DropStage, ...]]
    grid: tuple[int, int]
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    """Second predictions of dense tasks, like the first, for losses alone (cross-task refinement, in training)."""
    auxiliary_weight: float = 1.0
    """Of their losses, beside the weight of the task."""


class MultiTaskModel(nn.Module):
    """``model(images, tasks=("depth",))`` runs that task's path alone: its gates, its experts, its head.

    Dense heads get the patch tokens on their grid, dropped ones restored; those of several levels one such map for each
    block that they read. Classifiers get the tokens that are left, whatever other tasks are asked for.

    With a ``refinement`` training also gives auxiliary predictions of the dense tasks, where two or more are asked for;
    evaluation does without.
    """

    def __init__(
        self, backbone: TaskViTMixin, heads: Mapping[str, nn.Module], refinement: CrossTaskRefinement | None = None
    ) -> None:
        super().__init__()
        assert set(heads) == set(backbone.tasks), "one head per task of the backbone"
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.refinement = refinement

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.backbone.tasks

    def set_step(self, step: int) -> None:
        """Tell the training step (keep-rate schedules)."""
        self.backbone.set_step(step)

    def forward(
        self,
        images: Tensor,
        tasks: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        prefix: Prefix | None = None,
    ) -> ModelOutput:
        """Predict.

        Args:
            images: ``[B, 3, H, W]``, normalised.
            tasks: the tasks wanted, all by default; only their path is computed.
            size: height and width of dense predictions, by default those of the images.
            prefix: tokens of these images behind the first blocks, where they are known (:meth:`forward_prefix`).
        """
        size = (images.shape[-2], images.shape[-1]) if size is None else size
        dense = [task for task in (self.tasks if tasks is None else tasks) if self._is_dense(task)]
        levels = {block for task in dense for block in self._levels(task)}
        output = self.backbone.forward_tasks(images, tasks, restored=dense, levels=levels, prefix=prefix)
        predictions, auxiliary = {}, {}
        inputs = {task: self._head_input(task, output) for task in output.features}
        if self.training and self.refinement is not None and len(dense) > 1:
            features = {task: self._dense_head(task).features(inputs[task]) for task in dense}
            predictions = {task: self._dense_head(task).predict(x, size) for task, x in features.items()}
            auxiliary = self.refinement(features, size)
        for task, x in inputs.items():
            if task not in predictions:
                predictions[task] = self.heads[task](x, size) if task in dense else self.heads[task](x)
        return ModelOutput(
            predictions=predictions,
            balance_loss=output.balance_loss,
            z_loss=output.z_loss,
            routing=output.routing,
            stages=output.stages,
            grid=output.grid,
            auxiliary=auxiliary,
            auxiliary_weight=1.0 if self.refinement is None else self.refinement.weight,
        )

    @property
    def first_read(self) -> int:
        """The first block whose output a head reads; what lies before it may be known beforehand (a ``prefix``)."""
        return min((block for task in self.tasks for block in self._levels(task)), default=len(self.backbone.blocks))

    def forward_prefix(self, images: Tensor, num_blocks: int) -> Prefix:
        """Tokens of ``images`` behind the first ``num_blocks`` blocks, which must be the same for all tasks.

        With a dense task among the heads they hold what it takes to restore the grid.
        """
        restorable = any(map(self._is_dense, self.tasks))
        state, _ = self.backbone.forward_tokens(images, restorable=restorable, stop=num_blocks)
        return Prefix(state, num_blocks)

    def _is_dense(self, task: str) -> bool:
        return task in self.heads and not isinstance(self.heads[task], ClassifierHead)

    def _dense_head(self, task: str) -> DenseHead:
        head = self.heads[task]
        assert isinstance(head, DenseHead)
        return head

    def _head_input(self, task: str, output: BackboneOutput) -> Any:
        """Tokens, their grid, or the grids of several blocks."""
        if self._levels(task):
            return [self._grid(output.levels[task][block], output.grid) for block in self._levels(task)]
        x_BND = output.features[task]
        return self._grid(x_BND, output.grid) if self._is_dense(task) else x_BND

    def _levels(self, task: str) -> tuple[int, ...]:
        """The blocks that the head of a task reads, if it reads several."""
        head = self.heads[task]
        return head.reads if isinstance(head, DenseHead) else ()

    def _grid(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens as a map ``[B, D, h, w]``."""
        return x_BND[:, self.backbone.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
