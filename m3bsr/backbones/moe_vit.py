"""M3ViT-style backbones: timm's ``VisionTransformer`` with mixtures of experts in some blocks, gated by task.

Source: M3ViT, NeurIPS 2022 (MoE in the odd blocks, 16 experts of a quarter of the dense width, 4 per token, one gate
per task). Head counts are DeiT's (3, 6, 12), so that DeiT weights fit; the published small model has 12 heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import timm
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from m3bsr.backbones.task_vit import TaskViTMixin, add_moe, drop_final_norm
from m3bsr.backbones.weights import load_weights
from m3bsr.bsr.reprogram import recast
from m3bsr.plan import Plan


class MoEVisionTransformer(TaskViTMixin):
    """timm's ViT with MoE blocks; ``model(images, tasks=("depth",))`` runs one task's path.

    Args:
        img_size: ``(H, W)`` or one number; ``set_input_size`` changes it later.
        moe_blocks: 0-based blocks whose MLP is a mixture; ``None``: the odd ones; ``()``: a dense ViT.
        num_experts, top_k, moe_mlp_ratio: experts per block (one number, or one for each MoE block), experts per token,
            expert width over ``embed_dim``.
        gate, gate_mode: names out of ``m3bsr.moe``: kind of gate; ``shared``, ``per_task`` or ``task_conditioned``.
        experts_per_task: width of each task's window of experts, ``None``: all experts for all tasks.
        task_dim: width of the code that tells a task-conditioned gate its task.
        gate_input: gates read what the experts read (``after`` attention), or the block's input (``before``).
        tasks: names of the tasks that the model knows.
        noise_std, renormalize: see the gate. The published model does not renormalise; upcycled weights want it.
        drop_path: stochastic depth rate of the last block (linear from 0).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        moe_blocks: Sequence[int] | None = None,
        num_experts: int | Sequence[int] = 16,
        top_k: int = 4,
        moe_mlp_ratio: float = 1.0,
        gate: str = "vmoe",
        gate_mode: str = "per_task",
        tasks: Sequence[str] = ("semseg", "depth"),
        noise_std: float = 0.0,
        renormalize: bool = False,
        backend: str = "auto",
        experts_per_task: int | None = None,
        task_dim: int = 64,
        gate_input: str = "after",
        drop_path: float = 0.0,
        in_chans: int = 3,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path,
            final_norm=False,
        )
        self.tasks = tuple(tasks)
        add_moe(
            self,
            blocks=range(1, depth, 2) if moe_blocks is None else moe_blocks,
            tasks=self.tasks,
            num_experts=num_experts,
            top_k=top_k,
            mlp_ratio=moe_mlp_ratio,
            gate=gate,
            gate_mode=gate_mode,
            noise_std=noise_std,
            renormalize=renormalize,
            backend=backend,
            experts_per_task=experts_per_task,
            task_dim=task_dim,
            gate_input=gate_input,
        )
        self.set_plan(Plan())


def task_backbone(vit: VisionTransformer, tasks: Sequence[str]) -> TaskViTMixin:
    """Any timm ``VisionTransformer`` as a backbone for tasks (dense; add experts with ``add_moe``)."""
    backbone = recast(vit, TaskViTMixin)
    assert isinstance(backbone, TaskViTMixin)
    backbone.tasks = tuple(tasks)
    drop_final_norm(backbone)
    backbone.set_plan(Plan())
    return backbone


# M3ViT has no published weights to start from: the dense model whose weights it is upcycled from.
DENSE_NAMES = {
    "m3vit_tiny_patch16": "deit_tiny_patch16_224",
    "m3vit_small_patch16": "deit_small_patch16_224",
    "m3vit_base_patch16": "deit_base_patch16_224",
}


def _m3vit(name: str, pretrained: bool, embed_dim: int, num_heads: int, **kwargs) -> MoEVisionTransformer:
    for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm's factory passes them to everyone
        kwargs.pop(unused, None)
    model = MoEVisionTransformer(**{"embed_dim": embed_dim, "num_heads": num_heads, **kwargs})
    if pretrained:
        load_weights(model, timm.create_model(DENSE_NAMES[name], pretrained=True).state_dict())
    return model


@register_model
def m3vit_tiny_patch16(pretrained: bool = False, **kwargs) -> MoEVisionTransformer:
    """M3ViT-tiny: 192 channels, 12 blocks, 3 heads."""
    return _m3vit("m3vit_tiny_patch16", pretrained, 192, 3, **kwargs)


@register_model
def m3vit_small_patch16(pretrained: bool = False, **kwargs) -> MoEVisionTransformer:
    """M3ViT-small: 384 channels, 12 blocks, 6 heads."""
    return _m3vit("m3vit_small_patch16", pretrained, 384, 6, **kwargs)


@register_model
def m3vit_base_patch16(pretrained: bool = False, **kwargs) -> MoEVisionTransformer:
    """M3ViT-base: 768 channels, 12 blocks, 12 heads."""
    return _m3vit("m3vit_base_patch16", pretrained, 768, 12, **kwargs)
