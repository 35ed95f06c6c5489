"""Pictures: what is bright, grey or coloured, and how pictures are grouped."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from m3bsr.report.panels import (
    Sample,
    expert_group,
    expert_palette,
    expert_picture,
    grid_lines,
    patch_pixels,
    save_panel,
    shrink,
    task_group,
    token_group,
    token_picture,
)


def photo(height: int = 12, width: int = 18) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sample() -> Sample:
    first, second = np.array([1, 1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 0, 0], bool)
    other = np.array([0, 0, 1, 0, 0, 1], bool)
    picture = photo()
    return Sample(
        name="room",
        photo=picture,
        predictions={"semseg": picture, "depth": picture},
        targets={"depth": picture},
        grid=(2, 3),
        kept={"semseg": [(3, first), (6, second)], "depth": [(3, first), (6, other)]},
        experts={"semseg": {5: np.array([0, 1, 2, -1, -1, 3])}, "depth": {5: np.zeros(6, int)}},
        num_experts=4,
    )


def test_kept_patches_are_untouched_and_dropped_ones_are_grey() -> None:
    picture = token_picture(photo(), np.array([1, 0, 1, 0, 1, 0], bool), (2, 3))
    kept = patch_pixels(np.array([1, 0, 1, 0, 1, 0], bool), (2, 3), (12, 18))
    np.testing.assert_array_equal(picture[kept], photo()[kept])
    dropped = picture[~kept].astype(int)
    assert (dropped.max(axis=-1) - dropped.min(axis=-1)).max() == 0
    lines = grid_lines((2, 3), (12, 18)) & ~kept
    assert picture[lines].mean() > picture[~lines & ~kept].mean() + 20  # the outline of the patches


def test_patch_pixels_of_sides_that_do_not_divide() -> None:
    pixels = patch_pixels(np.arange(6), (2, 3), (5, 7))
    assert pixels.shape == (5, 7)
    assert (pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1]) == (0, 2, 3, 5)
    assert set(pixels.ravel()) == set(range(6))
    with pytest.raises(ValueError, match="2 x 3 patches"):
        patch_pixels(np.arange(5), (2, 3), (5, 7))


def test_experts_have_colours_and_dropped_patches_none() -> None:
    picture = expert_picture(photo(), np.array([0, 1, 2, 3, -1, 0]), (2, 3), 4).astype(int)
    spread = picture.max(axis=-1) - picture.min(axis=-1)
    assert spread[:6, :6].min() > 30
    assert spread[6:, 6:12].max() == 0  # the patch with -1


@pytest.mark.parametrize("num_experts", [1, 8, 16])
def test_expert_colours_are_distinct(num_experts: int) -> None:
    palette = expert_palette(num_experts).astype(int)
    assert palette.shape == (num_experts, 3)
    distance = np.abs(palette[:, None] - palette[None]).sum(-1) + 1000 * np.eye(num_experts, dtype=int)
    assert distance.min() > 40


def test_shrinking_never_blends_colours() -> None:
    labels = np.repeat(np.arange(100, dtype=np.uint8)[:, None, None], 3, axis=-1).repeat(50, axis=1)
    small = shrink(labels, 40)
    assert max(small.shape[:2]) <= 40
    assert set(small.ravel()) <= set(labels.ravel())
    assert shrink(labels, 100) is not None and shrink(labels, 100).shape == labels.shape


def test_ground_truth_stands_before_prediction() -> None:
    captions = [p.caption for p in task_group(sample()).pictures]
    assert captions == ["photo", "semseg: prediction", "depth: ground truth", "depth: prediction"]


def test_tasks_that_kept_the_same_patches_share_a_picture() -> None:
    captions = [p.caption for p in token_group(sample()).pictures]
    assert captions == [
        "block 3: 4 of 6 patches",
        "block 6, semseg: 2 of 6 patches",
        "block 6, depth: 2 of 6 patches",
    ]


def test_experts_by_task_and_block() -> None:
    assert [p.caption for p in expert_group(sample()).pictures] == ["semseg, block 5", "depth, block 5"]


def test_panel_file(tmp_path) -> None:
    path = tmp_path / "new" / "room.png"
    save_panel(sample(), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 4 * 200 and image.height > 3 * 150
