"""Published checkpoints: parity of routing and features, and names there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3bsr.backbones import (
    MoEVisionTransformer,
    load_published_weights,
    published_state_dict,
    read_published,
    save_published_weights,
)

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


@pytest.mark.parametrize("num_ranks", [None, 1, 2, 4])
def test_written_files_are_read_back(tmp_path: Path, num_ranks: int | None) -> None:
    backbone, path = published_backbone(), tmp_path / ("one.pth" if num_ranks is None else "ranks")
    load_published_weights(backbone, STATE)
    save_published_weights(backbone, path, num_ranks)
    if num_ranks:
        shares = [torch.load(path / f"{rank}.pth", weights_only=True)["state_dict"] for rank in range(num_ranks)]
        assert shares[-1].keys() == STATE.keys()
        name = "backbone.blocks.1.mlp.experts.htoh4.weight"
        assert torch.equal(shares[-1][name], STATE[name][8 - 8 // num_ranks :])
    read = read_published(path)
    assert read.keys() == STATE.keys() and all(torch.equal(read[k], STATE[k]) for k in STATE)
    other = published_backbone()
    load_published_weights(other, path)
    torch.testing.assert_close(other(TENSORS["x"])["depth"], TENSORS["features/depth"], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_written_by_rank_is_refused(tmp_path: Path) -> None:
    backbone = published_backbone()
    with pytest.raises(ValueError, match="experts.htoh4.weight: 8 experts do not divide among 3 ranks"):
        save_published_weights(backbone, tmp_path, 3)
    save_published_weights(backbone, tmp_path, 4)
    with pytest.raises(ValueError, match="holds 2.pth, which is none of 2 ranks"):
        save_published_weights(backbone, tmp_path, 2)


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    backbone = published_backbone()
    with pytest.raises(ValueError, match="missing cls_token"):
        load_published_weights(backbone, {k: v for k, v in STATE.items() if "cls_token" not in k})
    with pytest.raises(ValueError, match="pos_embed is"):
        load_published_weights(backbone, {**STATE, "backbone.pos_embed": torch.zeros(1, 5, 48)})
