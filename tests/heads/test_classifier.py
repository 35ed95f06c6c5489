"""The classifier head beside timm's own final layers."""

from __future__ import annotations

import pytest
import timm
import torch

from m3bsr.backbones import task_backbone
from m3bsr.bsr import Plan, reprogram
from m3bsr.heads import ClassifierHead
from m3bsr.models import MultiTaskModel

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 7}
FAMILIES = {
    "class token": ("vit_tiny_patch16_224", {"patch_size": 8}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 8}),
    "mean": ("vit_base_patch16_siglip_gap_224", {"patch_size": 8}),
    "attention": ("vit_base_patch16_siglip_224", {"patch_size": 8}),
    "attention beside registers": ("vit_so150m_patch16_reg4_map_256", {"patch_size": 8, "mlp_ratio": 4}),
    "mean with the class token": (
        "vit_tiny_patch16_224",
        {"patch_size": 8, "global_pool": "avg", "pool_include_prefix": True},
    ),
    "mean, norm behind it": ("vit_tiny_patch16_224", {"patch_size": 8, "global_pool": "avg", "class_token": False}),
}


def pair(family: str) -> tuple[torch.nn.Module, MultiTaskModel]:
    """A timm classifier, and the same weights as a task model."""
    torch.manual_seed(0)
    name, kwargs = FAMILIES[family]
    vit = timm.create_model(name, **SMALL, **kwargs)
    with torch.no_grad():
        for p in vit.parameters():  # norms that are not the identity, and a head that does something
            p.add_(torch.randn_like(p) * 0.1)
    twin = timm.create_model(name, **SMALL, **kwargs)
    twin.load_state_dict(vit.state_dict())
    head = ClassifierHead(twin, 7)
    head.logits.load_state_dict(vit.head.state_dict())
    return vit.eval(), MultiTaskModel(task_backbone(twin, ["classification"]), {"classification": head}).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep_rate", [1.0, 0.5])
def test_logits_are_those_of_timms_classifier(family, keep_rate):
    vit, model = pair(family)
    plan = Plan((1, 2), drop_blocks=(0, 1), keep_rate=keep_rate, score_source="own")
    model.backbone.set_plan(plan)
    images = torch.randn(3, 3, 32, 32)
    expected = reprogram(vit, plan)(images)
    found = model(images).predictions["classification"]
    assert found.shape == (3, 7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_final_layers_come_with_the_weights_and_the_class_layer_stays_fresh():
    vit, model = pair("class token")
    head = ClassifierHead(timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 0}), 4)
    fresh = head.logits.weight.clone()
    head.load_final({**vit.state_dict(), "fc_norm.weight": torch.zeros(3)})
    assert torch.equal(head.norm.weight, vit.norm.weight) and torch.equal(head.norm.bias, vit.norm.bias)
    assert torch.equal(head.logits.weight, fresh) and head.logits.out_features == 4


def test_dropped_tokens_are_not_brought_back_for_a_classifier():
    _, model = pair("class token")
    model.backbone.set_plan(Plan((2,), drop_blocks=(0, 1), keep_rate=0.5))
    output = model.backbone.forward_tasks(torch.randn(2, 3, 32, 32), restored=False)
    assert output.features["classification"].shape[1] == model.backbone.tokens_after_block[-1] < 17
