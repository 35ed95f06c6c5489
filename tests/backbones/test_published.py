"""Published checkpoints: parity of routing and features, and names there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3bsr.backbones import MoEVisionTransformer, load_published_weights, published_state_dict

TENSORS = load_file(Path(__file__).parents[1] / "golden" / "m3vit_moe.safetensors")
STATE = {k.removeprefix("weights/"): v for k, v in TENSORS.items() if k.startswith("weights/")}


def published_backbone() -> MoEVisionTransformer:
    return MoEVisionTransformer(
        img_size=(64, 80),
        patch_size=16,
        embed_dim=48,
        depth=4,
        num_heads=4,
        mlp_ratio=4,
        moe_blocks=(1, 3),
        num_experts=8,
        top_k=2,
        moe_mlp_ratio=1,
        gate="vmoe",
        gate_mode="per_task",
        tasks=("semseg", "depth"),
        noise_std=0.0,
    ).eval()


def test_features_and_routing_equal_the_published_model() -> None:
    backbone = published_backbone()
    load_published_weights(backbone, STATE)
    output = backbone.forward_tasks(TENSORS["x"])
    for number, task in enumerate(("semseg", "depth")):
        torch.testing.assert_close(output.features[task], TENSORS[f"features/{task}"], rtol=1e-4, atol=1e-5)
        tokens = slice(number * 42, (number + 1) * 42)
        assert torch.equal(output.routing[1].experts_TK[tokens], TENSORS[f"moe1/{task}/indices"].long())
        torch.testing.assert_close(output.routing[1].weights_TK[tokens], TENSORS[f"moe1/{task}/weights"])


def test_one_task_alone_gives_the_same_features() -> None:
    backbone = published_backbone()
    load_published_weights(backbone, STATE)
    alone = backbone(TENSORS["x"], tasks=("depth",))
    assert list(alone) == ["depth"]
    torch.testing.assert_close(alone["depth"], TENSORS["features/depth"], rtol=1e-4, atol=1e-5)


def test_names_round_trip_and_ranks_join(tmp_path: Path) -> None:
    backbone = published_backbone()
    load_published_weights(backbone, STATE)
    written = published_state_dict(backbone)
    assert written.keys() == STATE.keys() and all(torch.equal(written[k], STATE[k]) for k in STATE)

    for rank in range(2):
        experts = {k: v[rank * 4 : rank * 4 + 4].clone() for k, v in STATE.items() if ".experts." in k}
        torch.save({"state_dict": experts if rank else {**STATE, **experts}}, tmp_path / f"{rank}.pth")
    other = published_backbone()
    load_published_weights(other, tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), backbone.state_dict().values(), strict=True)
    )


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    backbone = published_backbone()
    with pytest.raises(ValueError, match="missing cls_token"):
        load_published_weights(backbone, {k: v for k, v in STATE.items() if "cls_token" not in k})
    with pytest.raises(ValueError, match="pos_embed is"):
        load_published_weights(backbone, {**STATE, "backbone.pos_embed": torch.zeros(1, 5, 48)})
