"""What each drop left of a photograph, as numbers and as a picture."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from m3bsr.bsr.tokens import drop, start
from m3bsr.report.tokens import (
    TokenRow,
    TokensLeft,
    outlines,
    relative_weight,
    save_tokens,
    tokens_left,
    tokens_picture,
)

GRID = (2, 3)
FUSE = ("sum", "none")


def stages(fuse: str):
    """Two images, one prefix token, six patches: the last three go, then the first (and, with sum, the fused one)."""
    state = start(torch.randn(2, 7, 4), 1)
    first = torch.tensor([[0.3, 0.2, 0.2, 0.1, 0.1, 0.05], [0.05, 0.1, 0.1, 0.2, 0.2, 0.3]])
    state = drop(state, first, block=3, keep_rate=0.5, fuse=fuse)
    second = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.1, 0.4, 0.3, 0.2]])[:, : state.num_ordinary]
    return drop(state, second, block=6, keep_rate=0.5, fuse=fuse).stages


def test_kept_fused_and_lost_patches_of_each_image() -> None:
    summed = tokens_left(stages("sum"), 0)
    assert [(s.block, s.num_tokens, s.num_kept, s.num_fused, s.num_lost) for s in summed] == [
        (3, 5, 3, 1, 0),
        (6, 4, 2, 1, 0),
    ]
    assert summed[0].kept_P.tolist() == [True, True, True, False, False, False]
    np.testing.assert_allclose(summed[0].fused_FP, [[0, 0, 0, 0.4, 0.4, 0.2]], rtol=1e-5)
    # the second fused token: .1 of patch 0, and .2 of the first one (.1, .1, .05 of patches 3 to 5)
    np.testing.assert_allclose(summed[1].fused_FP, [np.array([0.1, 0, 0, 0.02, 0.02, 0.01]) / 0.15], rtol=1e-5)
    other = tokens_left(stages("sum"), 1)
    assert other[0].kept_P.tolist() == [False, False, False, True, True, True]
    assert other[0].caption == "block 3: 3 of 6 patches + 1 fused"

    mean = tokens_left(stages("mean"), 0)
    assert [(s.num_tokens, s.num_kept, s.num_fused, s.num_lost) for s in mean] == [(5, 3, 1, 0), (5, 2, 2, 0)]
    np.testing.assert_allclose(mean[1].fused_FP, [[0, 0, 0, 0.4, 0.4, 0.2], [1, 0, 0, 0, 0, 0]], rtol=1e-5)

    none = tokens_left(stages("none"), 0)
    assert [(s.num_tokens, s.num_kept, s.num_fused, s.num_lost) for s in none] == [(4, 3, 0, 3), (3, 2, 0, 4)]
    assert none[1].caption == "block 6: 2 of 6 patches"


def test_merged_patches_are_neither_kept_nor_lost() -> None:
    state = start(torch.randn(1, 6, 4), 0)
    keys = torch.eye(3).repeat(2, 1)[None]  # patch i + 3 is the double of patch i
    state = drop(state, torch.tensor([[6.0, 5, 4, 3, 2, 1]]), block=3, keep_rate=0.5, fuse="merge", keys_BMd=keys)
    state = drop(state, torch.tensor([[3.0, 2, 1]]), block=6, keep_rate=0.5, fuse="merge", keys_BMd=keys[:, [0, 1, 0]])
    first, second = tokens_left(state.stages, 0)
    assert (first.num_kept, first.num_merged, first.num_fused, first.num_lost) == (3, 3, 0, 0)
    assert first.caption == "block 3: 3 of 6 patches, 3 merged into them"
    assert (second.num_tokens, second.num_kept, second.num_merged, second.num_lost) == (2, 2, 4, 0)
    assert second.kept_P.tolist() == [True, True, False, False, False, False]
    np.testing.assert_allclose(second.merged_P, [0, 0, 1, 1, 1, 1], rtol=1e-5)


def test_weights_are_relative_to_the_heaviest_patch_of_the_token() -> None:
    weights = relative_weight(np.array([[0, 0.6, 0.3, 0.1, 0], [0.2, 0, 0, 0, 0.8]]))
    np.testing.assert_allclose(weights, [0.25, 1, 0.5, 1 / 6, 1])
    assert relative_weight(np.zeros((0, 3))).tolist() == [0, 0, 0]


def test_kept_patches_are_untouched_heavy_ones_bright_and_lost_ones_dark() -> None:
    photo = np.full((20, 30, 3), 200, np.uint8)
    kept = np.array([1, 0, 0, 0, 0, 0], bool)
    step = TokensLeft(3, 3, kept, np.array([[0, 0.8, 0.2, 0, 0, 0]]), np.zeros(6))
    picture = tokens_picture(photo, step, GRID).astype(int)
    assert picture.shape == photo.shape
    assert (picture[:9, :9] == 200).all() and (picture[9, :9] == 255).all()  # the white edge lies within the kept patch
    heavy, light, lost = picture[4, 15], picture[4, 25], picture[15, 15]
    assert heavy[0] > light[0] > lost[0] and heavy[0] - heavy[1] > 80
    assert lost.max() < 70 and lost.max() - lost.min() < 8


def test_outlines_lie_inside_and_not_along_the_border() -> None:
    mask = np.zeros((6, 6), bool)
    mask[:4, :4] = True
    edge = outlines(mask)
    assert edge[3, :4].all() and edge[:4, 3].all() and edge.sum() == 7
    assert not outlines(np.ones((4, 4), bool)).any()


def test_one_row_a_photo_and_a_scale_where_there_are_fused_tokens(tmp_path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    fused, lost = ([TokenRow("a.jpg", photo, GRID, tokens_left(stages(f), i)) for i in range(2)] for f in FUSE)
    save_tokens(fused, tmp_path / "new" / "two.png")
    save_tokens(lost[:1], tmp_path / "one.png")
    with Image.open(tmp_path / "new" / "two.png") as two, Image.open(tmp_path / "one.png") as one:
        assert two.format == "PNG" and two.width == one.width > 3 * 200
        assert two.height - one.height > 150 + 50
