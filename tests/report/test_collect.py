"""From a model to arrays: which patch a token is, and that a real model's report adds up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from m3bsr.bsr import tokens
from m3bsr.build import build_model, build_tasks
from m3bsr.config import Config, replace
from m3bsr.moe.routing import Routing
from m3bsr.report.collect import collect, collect_from, denormalise, first_choice, patch_of_token

GRID = (4, 6)
CONFIG = replace(
    Config(),
    {
        "data.tasks": ("semseg", "depth"),
        "data.image_size": (64, 96),
        "model.backbone": "m3vit_tiny_patch16",
        "moe.num_experts": 4,
        "moe.top_k": 2,
        "moe.blocks": (3, 7, 11),
        "bsr.train_blocks": (7, 11),
        "bsr.drop_blocks": (2, 5),
        "bsr.keep_rate": 0.6,
    },
)


@pytest.fixture(scope="module")
def collected():
    torch.manual_seed(0)
    model = build_model(replace(CONFIG, {"bsr.restore_before": 11}))
    images = torch.randn(2, 3, 64, 96)
    photos = [np.zeros((30, 50, 3), np.uint8), np.ones((64, 96, 3), np.uint8)]
    targets = {"depth": [torch.ones(1, 64, 96)] * 2}
    model.train()
    result = collect(model, build_tasks(CONFIG), images, photos=photos, names=["a", "b"], targets=targets)
    assert model.training, "the training mode is put back"
    return result


@pytest.mark.parametrize("fuse", ["sum", "mean", "none"])
def test_every_token_knows_its_patch(fuse: str) -> None:
    """Tokens carry their patch number as a feature, so what the drops did can be read from them."""
    torch.manual_seed(0)
    prefix, patches = 2, GRID[0] * GRID[1]
    number = torch.cat([torch.full((prefix,), -1.0), torch.arange(patches).float()])
    state = tokens.start(number[None, :, None].repeat(3, 1, 1), prefix)
    kinds: dict[int, torch.Tensor] = {}
    for block in (2, 5):
        state = tokens.drop(state, torch.rand(3, state.num_ordinary), block=block, keep_rate=0.5, fuse=fuse)
        kinds[block] = state.x_BND[..., 0]
    for block, seen_from in ((1, None), (2, 2), (4, 2), (5, 5), (9, 5)):
        truth = number.expand(3, -1) if seen_from is None else kinds[seen_from]
        found = patch_of_token(state.stages, block, truth.shape[1], 3, GRID)
        assert found.shape == truth.shape
        alone = found >= 0
        assert torch.equal(found[alone].float(), truth[alone])
        fused_B = (~alone).sum(1) - prefix
        num_drops = sum(seen_from is not None and at <= seen_from for at in (2, 5))
        most = 0 if fuse == "none" else num_drops
        # A "sum" token may be dropped by the next drop, a protected one may not.
        assert (fused_B <= most).all() and (fused_B >= (min(most, 1) if fuse == "sum" else most)).all()


def test_a_full_grid_after_drops_is_in_image_order() -> None:
    state = tokens.start(torch.randn(1, 25, 2), 1)
    state = tokens.drop(state, torch.rand(1, 24), block=2, keep_rate=0.5, fuse="sum")
    assert patch_of_token(state.stages, 9, 25, 1, GRID).tolist() == [[-1, *range(24)]]


def test_first_choice_is_the_heaviest_and_streams_may_be_shared() -> None:
    experts = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]])
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.4], [0.1, 0.3]])
    zero = torch.zeros(())
    routing = Routing(weights, experts, zero, zero, 4, ("semseg", "depth"))
    assert first_choice(routing, "semseg", 1).tolist() == [[0, 3]]
    assert first_choice(routing, "depth", 2).tolist() == [[1], [2]]
    alone = routing._replace(tasks=("semseg",))
    assert first_choice(alone, "depth", 2).tolist() == [[0, 3], [1, 2]]


def test_pictures_and_stages_of_a_real_model(collected) -> None:
    first = collected.samples[0]
    assert first.grid == GRID and first.num_experts == 4
    assert {t: p.shape for t, p in first.predictions.items()} == {"semseg": (64, 96, 3), "depth": (64, 96, 3)}
    assert set(first.targets) == {"depth"} and first.photo.shape == (30, 50, 3)
    for task in ("semseg", "depth"):
        (block_a, kept_a), (block_b, kept_b) = first.kept[task]
        assert (block_a, block_b) == (2, 5)
        assert kept_a.sum() == 15 and kept_b.sum() in (9, 10)  # ceil(.6 * 24), then ceil(.6 * 16), one may be fused
        assert not (kept_b & ~kept_a).any()


def test_dropped_patches_have_no_expert_until_they_are_back(collected) -> None:
    for sample in collected.samples:
        for task, blocks in sample.experts.items():
            (_, after_2), (_, after_5) = sample.kept[task]
            np.testing.assert_array_equal(blocks[3] >= 0, after_2)
            np.testing.assert_array_equal(blocks[7] >= 0, after_5)
            assert (blocks[11] >= 0).all()  # restored before block 11
            assert blocks[11].max() < 4


def test_load_counts_every_choice(collected) -> None:
    assert set(collected.load) == {3, 7, 11}
    for task in ("semseg", "depth"):
        assert sum(collected.load[11][task]) == 2 * 25 * 2  # images, tokens with the class token, choices


def test_samples_of_a_data_set_are_spread_evenly() -> None:
    class Rooms:
        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> dict:
            return {
                "image": torch.zeros(3, 64, 96),
                "semseg": torch.zeros(1, 64, 96, dtype=torch.int64),
                "depth": torch.ones(1, 64, 96),
                "name": str(index),
            }

    torch.manual_seed(0)
    result = collect_from(build_model(CONFIG), build_tasks(CONFIG), Rooms(), 3, longest=48)
    assert [s.name for s in result.samples] == ["0", "4", "8"]
    assert result.samples[0].photo.shape == (32, 48, 3)
    assert set(result.samples[0].targets) == {"semseg", "depth"}


def test_denormalise_is_the_inverse_of_the_transform() -> None:
    from torchvision import tv_tensors

    from m3bsr.data import build_transform

    photo = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    image = build_transform("none", (8, 8), train=False)({"image": tv_tensors.Image(photo)})["image"]
    np.testing.assert_array_equal(denormalise(image), photo.permute(1, 2, 0).numpy())


def test_drops_are_those_of_training_where_evaluation_keeps_every_token() -> None:
    """Predictions are evaluation's, and the model has its plan back."""
    torch.manual_seed(0)
    model = build_model(replace(CONFIG, {"bsr.restore_before": 11, "bsr.eval_keep_rate": 1.0}))
    plan, images, tasks = model.backbone.plan, torch.randn(1, 3, 64, 96), build_tasks(CONFIG)
    sample = collect(model, tasks, images, photos=[np.zeros((64, 96, 3), np.uint8)], names=["a"]).samples[0]
    assert model.backbone.plan is plan
    assert [(block, int(mask.sum())) for block, mask in sample.kept["depth"]] == [(2, 15), (5, 9)]  # of 24
    with torch.inference_mode():
        prediction = model.eval()(images).predictions["depth"][0]
    assert np.array_equal(sample.predictions["depth"], tasks["depth"].colour(prediction, is_prediction=True))
    assert all((ids >= 0).all() for ids in sample.experts["depth"].values())
