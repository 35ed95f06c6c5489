"""Against numbers of the published implementation (tests/golden/bsr_vit: small random ViT, five drop settings)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from m3bsr import Plan, reprogram

GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS = json.loads((GOLDEN / "bsr_vit.json").read_text())
CASES = {case["name"]: case for case in SETTINGS["cases"]}


def golden_vit(tensors: dict[str, torch.Tensor]) -> VisionTransformer:
    names = ("embed_dim", "num_heads", "img_size", "patch_size", "depth", "mlp_ratio", "num_classes")
    vit = VisionTransformer(**{name: SETTINGS[name] for name in names})
    vit.load_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    return vit


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_numbers(name: str) -> None:
    case, tensors = CASES[name], load_file(GOLDEN / "bsr_vit.safetensors")
    plan = Plan(
        train_blocks=tuple(SETTINGS["train_blocks"]),
        drop_blocks=tuple(case["drop_blocks"]),
        keep_rate=case["keep_rate"],
        fuse="sum" if case["fuse"] else "none",
        score_source="own",
    )
    model = reprogram(golden_vit(tensors), plan)
    logits = model(tensors["x"])
    loss = F.cross_entropy(logits, tensors["y"])
    loss.backward()

    torch.testing.assert_close(logits, tensors[f"{name}/logits"], rtol=1e-4, atol=1e-5)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert model.report().parameters.trained == case["trainable"]
    assert list(model.tokens_after_block) == case["tokens_after_block"]
    gradients = {k.removeprefix(f"{name}/grad/"): v for k, v in tensors.items() if k.startswith(f"{name}/grad/")}
    assert len(gradients) >= 4
    parameters = dict(model.named_parameters())
    for key, expected in gradients.items():
        torch.testing.assert_close(parameters[key].grad, expected, rtol=1e-4, atol=1e-6)
