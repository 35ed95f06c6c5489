"""A dense task and a class per image on one backbone."""

from __future__ import annotations

import pytest
import timm
import torch

from m3bsr.backbones import add_moe, task_backbone
from m3bsr.bsr import Plan
from m3bsr.heads import HEADS, ClassifierHead
from m3bsr.models import MultiTaskModel


@pytest.mark.parametrize(("restore_before", "moe"), [(None, False), (None, True), (2, False)])
def test_what_a_classifier_says_does_not_hang_on_the_other_tasks_asked_for(restore_before, moe):
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "global_pool": "avg"}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, **kwargs)
    heads = {"classification": ClassifierHead(vit, 5), "depth": HEADS["light"](24, 1, head_dim=8)}
    backbone = task_backbone(vit, tuple(heads))
    if moe:
        add_moe(
            backbone,
            blocks=(1,),
            tasks=tuple(heads),
            num_experts=4,
            top_k=2,
            mlp_ratio=1.0,
            gate="vmoe",
            gate_mode="per_task",
        )
    model = MultiTaskModel(backbone, heads).eval()
    model.backbone.set_plan(Plan((2, 3), drop_blocks=(0, 1), keep_rate=0.5, restore_before=restore_before))
    images = torch.randn(3, 3, 32, 32)
    both = model(images).predictions
    for task in heads:
        torch.testing.assert_close(both[task], model(images, tasks=(task,)).predictions[task])
