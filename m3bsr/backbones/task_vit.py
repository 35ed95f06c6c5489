"""A ViT that serves several tasks: one shared prefix, then one stream of tokens per task.

Everything up to the attention of the first task-dependent block runs once for all tasks. From its MLP on, the tasks
are stacked in the batch (task-major), so that one call of each layer serves all of them, and each task drops its own
tokens. Only the tasks that are asked for are computed.

Shapes: B images, T tasks, N = P + h*w tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from m3bsr.bsr import DropStage, Prefix, ReprogrammedMixin, TokenState, restore
from m3bsr.moe import MoEMlp, Routing
from m3bsr.utils.lookup import lookup


@dataclass(frozen=True)
class BackboneOutput:
    """Features of each task and how they came about."""

    features: dict[str, Tensor]
    """``[B, P + h*w, D]`` per task, before any final norm, dropped tokens back in their places where asked for."""
    grid: tuple[int, int]
    routing: dict[int, Routing]
    """MoE block -> where its tokens went."""
    stages: dict[str, tuple[DropStage, ...]]
    """Per task the drops that its tokens went through."""
    balance_loss: Tensor
    z_loss: Tensor
    levels: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Per restored task the whole grid ``[B, P + h*w, D]`` behind each block that was asked for."""


class TaskViTMixin(ReprogrammedMixin):
    """Forward passes by task; the model's blocks may hold :class:`~m3bsr.moe.MoEMlp` layers."""

    tasks: tuple[str, ...]

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        return tuple(i for i, block in enumerate(self.blocks) if isinstance(block.mlp, MoEMlp))

    def _gates_train(self, block: int) -> bool:
        mlp = self.blocks[block].mlp
        return isinstance(mlp, MoEMlp) and any(p.requires_grad for p in mlp.gates.parameters())

    def _gated_before(self) -> frozenset[int]:
        """MoE blocks whose gates read the tokens as they enter the block."""
        mlps = [(i, self.blocks[i].mlp) for i in self.moe_blocks]
        return frozenset(i for i, mlp in mlps if isinstance(mlp, MoEMlp) and mlp.gate_input == "before")

    def forward(self, images: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """Features ``[B, P + h*w, D]`` of each task asked for (default: all), before any final norm."""
        return self.forward_tasks(images, tasks).features

    def forward_tasks(
        self,
        images: Tensor,
        tasks: Sequence[str] | None = None,
        *,
        restored: bool | Collection[str] = True,
        prefix: Prefix | None = None,
        levels: Collection[int] = (),
    ) -> BackboneOutput:
        """Like :meth:`forward`, with routing, drops and auxiliary losses.

        Args:
            images: ``[B, 3, H, W]``, normalised.
            tasks: names out of ``self.tasks``.
            restored: bring dropped tokens back, for all tasks or for those named; a classifier does without and saves
                the memory.
            prefix: tokens of these images behind the first blocks, where they are known.
            levels: blocks whose output is wanted, too, for the tasks that are restored. Dropped tokens are at their
                places in each of them, with features as ``Plan.restore`` has it at that block. No graph hangs on the
                levels before the first trained block, and tasks share those before the first task-dependent one.

        Raises:
            ValueError: an unknown task.
        """
        tasks = self.tasks if tasks is None else tuple(tasks)
        for task in tasks:
            lookup(dict.fromkeys(self.tasks), task, "task of this model")
        whole = frozenset(tasks if restored else ()) if isinstance(restored, bool) else frozenset(restored)
        routing: dict[int, Routing] = {}
        streams = tasks[:1]  # tasks that the batch is stacked for at this point

        def fork(index: int, state: TokenState) -> TokenState:
            nonlocal streams
            mlp = self.blocks[index].mlp
            if len(tasks) > 1 and len(streams) == 1 and isinstance(mlp, MoEMlp) and mlp.task_dependent:
                streams = tasks
                return state.repeat(len(tasks))
            return state

        def run_mlp(index: int, mlp: nn.Module, x_BND: Tensor, before_BND: Tensor | None) -> Tensor:
            if not isinstance(mlp, MoEMlp):
                return mlp(x_BND)
            y_BND, routing[index] = mlp(x_BND, streams, before_BND)
            return y_BND

        adapters = getattr(self, "bsr_adapters", None)
        last = len(self.blocks) - 1
        wanted, found = frozenset(levels), {task: dict[int, Tensor]() for task in tasks if task in whole}

        def tap(index: int, state: TokenState) -> None:
            if index in wanted and index != last and found:
                grids = _streams(restore(state, self.plan.restore, grid, adapters), tasks, streams)
                for task in found:
                    found[task][index] = grids[task]

        grid = self.patch_embed.dynamic_feat_size(images.shape[-2:])
        state, _ = self.forward_tokens(
            images,
            restorable=bool(found),
            run_mlp=run_mlp,
            fork=fork,
            want_before=self._gated_before(),
            prefix=prefix,
            tap=tap,
        )
        left = _streams(state, tasks, streams)
        if found:
            state = restore(state, self.plan.restore, grid, adapters)
        grids = _streams(state, tasks, streams)
        if last in wanted:  # restored once, as the output and as a level
            for task in found:
                found[task][last] = grids[task]
        # Not before: drops that are undone hold no features, which would live as long as the output.
        per_task = _split(state, len(streams)) if len(streams) > 1 else [state] * len(tasks)
        learning = [r for i, r in routing.items() if self._gates_train(i)]
        zero = state.x_BND.new_zeros(())
        return BackboneOutput(
            features={task: (grids if task in whole else left)[task] for task in tasks},
            grid=grid,
            routing=routing,
            stages={task: state.undone + state.stages for task, state in zip(tasks, per_task, strict=True)},
            balance_loss=sum((r.balance_loss for r in learning), zero),
            z_loss=sum((r.z_loss for r in learning), zero),
            levels=found,
        )


def _streams(state: TokenState, tasks: Sequence[str], streams: Sequence[str]) -> dict[str, Tensor]:
    """Tokens of each task, from the stack of streams or from the one that all share."""
    tokens = state.x_BND.chunk(len(streams)) if len(streams) > 1 else [state.x_BND] * len(tasks)
    return dict(zip(tasks, tokens, strict=True))


def _split(state: TokenState, times: int) -> list[TokenState]:
    """Undo ``TokenState.repeat``: one state per task."""
    return [state.map(lambda t, i=i: t.chunk(times)[i]) for i in range(times)]


def add_moe(
    vit: VisionTransformer,
    *,
    blocks: Sequence[int],
    tasks: Sequence[str],
    num_experts: int | Sequence[int],
    top_k: int,
    mlp_ratio: float,
    gate: str,
    gate_mode: str,
    noise_std: float = 0.0,
    renormalize: bool = False,
    backend: str = "auto",
    experts_per_task: int | None = None,
    task_dim: int = 64,
    gate_input: str = "after",
) -> None:
    """Replace the MLP of the given blocks by mixtures of experts (fresh weights; see ``m3bsr.backbones.weights``).

    Args:
        blocks: 0-based, each once.
        num_experts: in every block, or one number for each of ``blocks``.
        mlp_ratio: width of an expert over the embedding width.
        tasks, top_k, gate, ...: see :class:`~m3bsr.moe.MoEMlp`.

    Raises:
        ValueError: a block out of range, a number of experts for another number of blocks, or what ``MoEMlp`` refuses.
    """
    blocks = tuple(blocks)
    depth = len(vit.blocks)
    wrong = [i for i in blocks if not 0 <= i < depth]
    if wrong:
        raise ValueError(f"moe.blocks {wrong} out of range: the backbone has blocks 0 to {depth - 1}")
    numbers = (num_experts,) * len(blocks) if isinstance(num_experts, int) else tuple(num_experts)
    if len(numbers) != len(blocks):
        raise ValueError(f"moe.num_experts has {len(numbers)} numbers for {len(blocks)} MoE blocks {blocks}")
    reference = next(vit.parameters())
    for i, number in zip(blocks, numbers, strict=True):
        vit.blocks[i].mlp = MoEMlp(
            vit.embed_dim,
            round(vit.embed_dim * mlp_ratio),
            number,
            top_k,
            gate=gate,
            gate_mode=gate_mode,
            tasks=tuple(tasks),
            noise_std=noise_std,
            renormalize=renormalize,
            backend=backend,
            experts_per_task=experts_per_task,
            task_dim=task_dim,
            gate_input=gate_input,
        ).to(reference.device, reference.dtype)


def drop_final_norm(vit: nn.Module) -> None:
    """Dense heads normalise for themselves: take the classifier and the final norms away."""
    for name in ("norm", "fc_norm", "head", "head_dist", "head_drop"):
        if isinstance(getattr(vit, name, None), nn.Module):
            setattr(vit, name, nn.Identity())
    if getattr(vit, "attn_pool", None) is not None:
        vit.attn_pool = None  # type: ignore[assignment]
