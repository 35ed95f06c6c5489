"""Contract of every selector, and what sets each apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3bsr import Plan
from m3bsr.bsr import SELECTORS
from m3bsr.bsr.forward import block_roles
from m3bsr.bsr.selectors import Candidates
from m3bsr.bsr.selectors.cells import cell_side
from m3bsr.bsr.tokens import drop, num_kept, select, start

GRID = (6, 8)


def candidates(batch: int = 2, rate: float = 0.5, seed: int = 0, training: bool = False, num_fused: int = 0):
    """A list of tokens in image order, some patches gone already, fused tokens last."""
    generator = torch.Generator().manual_seed(seed)
    num_patches = GRID[0] * GRID[1]
    left = num_patches - 6
    patches = torch.stack([torch.randperm(num_patches, generator=generator)[:left].sort().values for _ in range(batch)])
    patches = torch.cat([patches, torch.full((batch, num_fused), -1)], dim=1)
    scores = torch.rand(patches.shape, generator=generator) / num_patches
    keys = torch.randn(*patches.shape, 4, generator=generator)
    return Candidates(scores, patches, num_kept(rate, patches.shape[1]), GRID, keys, training)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("num_fused", [0, 2])
def test_a_rank_per_token_and_image(name: str, num_fused: int) -> None:
    tokens = candidates(num_fused=num_fused)
    rank_BM = SELECTORS[name].rank(tokens)
    assert rank_BM.shape == tokens.patch_BM.shape and torch.isfinite(rank_BM.float()).all()
    assert torch.equal(rank_BM, SELECTORS[name].rank(tokens)), "evaluation is repeatable"
    keep, gone = select(rank_BM, tokens.num_keep)
    both = torch.cat([keep, gone], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(both.shape[1]).expand_as(both)) and keep.shape[1] == tokens.num_keep
    one = Candidates(
        tokens.scores_BM[1:], tokens.patch_BM[1:], tokens.num_keep, GRID, tokens.keys_BMd[1:], tokens.training
    )
    torch.testing.assert_close(SELECTORS[name].rank(one), rank_BM[1:])


@pytest.mark.parametrize("name", SELECTORS)
def test_a_drop_takes_any_selector(name: str) -> None:
    state = start(torch.randn(2, 1 + 48, 5), 1)
    keys = torch.randn(2, 48, 4)
    after = drop(
        state, torch.rand(2, 48), block=0, keep_rate=0.4, fuse="none", rank=SELECTORS[name].rank, grid=GRID,
        keys_BMd=keys, training=True,
    )  # fmt: skip
    assert after.num_ordinary == 20
    assert (after.patch_BM.diff(dim=1) > 0).all()


def num_in_cells(patch_K: torch.Tensor, side: int) -> torch.Tensor:
    cells = torch.zeros(-(-GRID[0] // side), -(-GRID[1] // side), dtype=torch.int64)
    for patch in patch_K.tolist():
        cells[patch // GRID[1] // side, patch % GRID[1] // side] += 1
    return cells


@settings(max_examples=40)
@given(st.floats(0.05, 1.0), st.integers(0, 99), st.sampled_from(["cover", "spread", "random"]), st.booleans())
def test_every_cell_keeps_a_token(rate: float, seed: int, name: str, training: bool) -> None:
    tokens = candidates(1, rate, seed, training)
    keep, _ = select(SELECTORS[name].rank(tokens), tokens.num_keep)
    side = cell_side(GRID, tokens.num_keep)
    there, kept = (num_in_cells(patches, side) for patches in (tokens.patch_BM[0], tokens.patch_BM[0, keep[0]]))
    if (there > 0).sum() <= tokens.num_keep:
        assert (kept[there > 0] > 0).all()
    if name != "cover":  # none has two more than another one that had more to give
        spare = kept[kept < there]
        assert spare.numel() == 0 or kept.max() - spare.min() <= 1


def test_cover_keeps_the_best_of_each_cell_and_then_the_best_of_all() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.7, 0.6, 0.3, 0.05]]).flatten()[None]
    tokens = Candidates(scores, torch.arange(8)[None], 4, (2, 4))
    keep, _ = select(SELECTORS["cover"].rank(tokens), 4)
    assert keep.tolist() == [[0, 1, 4, 6]]  # best of the cells: 0 and 6; then .8 and .7
    keep, _ = select(SELECTORS["spread"].rank(tokens), 4)
    assert keep.tolist() == [[0, 1, 3, 6]]
    assert select(SELECTORS["score"].rank(tokens), 4)[0].tolist() == [[0, 1, 4, 5]]


def test_random_gives_every_token_its_turn_in_training_only() -> None:
    torch.manual_seed(0)
    tokens = candidates(1, 0.25, training=True)
    seen = set()
    for _ in range(60):
        seen |= set(select(SELECTORS["random"].rank(tokens), tokens.num_keep)[0][0].tolist())
    assert seen == set(range(tokens.patch_BM.shape[1]))


def test_similar_lets_doubles_go_first() -> None:
    keys = torch.eye(8)[None].clone()
    keys[0, 1] = keys[0, 5]  # white and black on a board of 2x4
    tokens = Candidates(torch.ones(1, 8), torch.arange(8)[None], 7, (2, 4), keys)
    assert select(SELECTORS["similar"].rank(tokens), 7)[1].tolist() == [[1]]


def test_unknown_selectors_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="bsr.select 'scor' .did you mean 'score'"):
        block_roles(Plan((), select="scor"), 12)
