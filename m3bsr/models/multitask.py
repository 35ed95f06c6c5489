"""A backbone and a head per task. Tasks are known by name only.

Shapes: B images, N tokens, C channels of a task, D embedding width, h x w patches, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from m3bsr.backbones import TaskViTMixin
from m3bsr.bsr import DropStage, Prefix
from m3bsr.heads import ClassifierHead, DenseHead
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


class MultiTaskModel(nn.Module):
    """``model(images, tasks=("depth",))`` runs that task's path alone: its gates, its experts, its head.

    Dense heads get the patch tokens on their grid, dropped ones restored; those of several levels one such map for each
    block that they read. Classifiers get the tokens that are left, whatever other tasks are asked for.
    """

    def __init__(self, backbone: TaskViTMixin, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        assert set(heads) == set(backbone.tasks), "one head per task of the backbone"
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)

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
        predictions = {}
        for task, x_BND in output.features.items():
            head = self.heads[task]
            if self._levels(task):
                maps = [self._grid(output.levels[task][block], output.grid) for block in self._levels(task)]
                predictions[task] = head(maps, size)
            else:
                predictions[task] = head(self._grid(x_BND, output.grid), size) if self._is_dense(task) else head(x_BND)
        return ModelOutput(
            predictions=predictions,
            balance_loss=output.balance_loss,
            z_loss=output.z_loss,
            routing=output.routing,
            stages=output.stages,
            grid=output.grid,
        )

    def forward_prefix(self, images: Tensor, num_blocks: int) -> Prefix:
        """Tokens of ``images`` behind the first ``num_blocks`` blocks, which must be the same for all tasks.

        With a dense task among the heads they hold what it takes to restore the grid.
        """
        restorable = any(map(self._is_dense, self.tasks))
        state, _ = self.backbone.forward_tokens(images, restorable=restorable, stop=num_blocks)
        return Prefix(state, num_blocks)

    def _is_dense(self, task: str) -> bool:
        return task in self.heads and not isinstance(self.heads[task], ClassifierHead)

    def _levels(self, task: str) -> tuple[int, ...]:
        """The blocks that the head of a task reads, if it reads several."""
        head = self.heads[task]
        return head.reads if isinstance(head, DenseHead) else ()

    def _grid(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens as a map ``[B, D, h, w]``."""
        return x_BND[:, self.backbone.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
