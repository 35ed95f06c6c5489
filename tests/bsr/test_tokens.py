"""Properties of dropping, fusing and restoring."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from m3bsr.bsr.restore import restore
from m3bsr.bsr.tokens import drop, num_kept, patches_kept, select, start, take, token_sources

rates = st.floats(0.05, 1.0)
fuses = st.sampled_from(["sum", "mean", "none", "merge"])


def marked_tokens(batch: int, num_prefix: int, num_patches: int) -> torch.Tensor:
    """Tokens whose single channel is their place, prefix tokens negative."""
    marks = torch.cat([-torch.arange(1, num_prefix + 1), torch.arange(num_patches)]).float()
    return marks.expand(batch, -1).unsqueeze(-1).clone()


@given(st.integers(1, 3), st.integers(0, 3), st.integers(2, 40), st.lists(rates, min_size=1, max_size=3), fuses)
def test_drop_then_restore_puts_every_patch_back(batch, num_prefix, num_patches, keep_rates, fuse) -> None:
    x = marked_tokens(batch, num_prefix, num_patches)
    state = start(x, num_prefix)
    for block, rate in enumerate(keep_rates):
        scores, keys = torch.rand(batch, state.num_ordinary), torch.randn(batch, state.num_ordinary, 3)
        state = drop(state, scores, block=block, keep_rate=rate, fuse=fuse, remember=("dropped", "kept"), keys_BMd=keys)
    if fuse == "merge":  # kept tokens are means now, dropped ones were means when they were dropped
        rows = restore(state, "bypass", (1, num_patches)).x_BND[:, num_prefix:, 0]
        assert torch.equal(rows.gather(1, state.patch_BM), state.x_BND[:, num_prefix:, 0])
        return
    restored = restore(state, "bypass", (1, num_patches))
    assert torch.equal(restored.x_BND, x)
    assert restored.stages == () and restored.num_protected == 0


@given(st.integers(1, 30), rates, fuses)
def test_kept_tokens_stay_in_image_order_and_prefix_is_never_dropped(num_patches, rate, fuse) -> None:
    state = start(marked_tokens(2, 2, num_patches), 2)
    keys = torch.randn(2, num_patches, 3)
    after = drop(state, torch.rand(2, num_patches), block=0, keep_rate=rate, fuse=fuse, keys_BMd=keys)
    K = num_kept(rate, num_patches)
    assert torch.equal(after.x_BND[:, :2], state.x_BND[:, :2])
    kept = after.x_BND[:, 2 : 2 + K, 0]
    assert (after.patch_BM[:, :K].diff(dim=1) > 0).all()
    if fuse != "merge":
        assert torch.equal(kept.long(), after.patch_BM[:, :K])
    if num_patches == K:
        assert after is state


@given(st.integers(0, 3), st.integers(2, 30), st.lists(rates, min_size=1, max_size=3), fuses)
def test_what_entered_the_block_drops_and_fuses_as_the_tokens_do(num_prefix, num_patches, keep_rates, fuse) -> None:
    x = torch.rand(2, num_prefix + num_patches, 3)
    state = replace(start(x, num_prefix), before_BND=2 * x)
    plain = start(x, num_prefix)
    for block, rate in enumerate(keep_rates):
        scores, keys = torch.rand(2, state.num_ordinary), torch.randn(2, state.num_ordinary, 3)
        state = drop(state, scores, block=block, keep_rate=rate, fuse=fuse, keys_BMd=keys)
        plain = drop(plain, scores, block=block, keep_rate=rate, fuse=fuse, keys_BMd=keys)
    assert torch.equal(state.x_BND, plain.x_BND) and plain.before_BND is None
    torch.testing.assert_close(state.before_BND, 2 * state.x_BND)
    assert torch.equal(state.repeat(2).before_BND, torch.cat([state.before_BND] * 2))


@pytest.mark.parametrize(
    ("rate", "tokens", "kept"),
    [(0.5, 196, 98), (0.7, 196, 138), (0.7, 139, 98), (0.55, 100, 55), (0.001, 9, 1), (1, 7, 7)],
)
def test_number_of_kept_tokens(rate: float, tokens: int, kept: int) -> None:
    assert num_kept(rate, tokens) == kept


def test_ties_are_broken_by_position() -> None:
    keep, gone = select(torch.tensor([[0.1, 0.5, 0.5, 0.5, 0.1]]), 2)
    assert keep.tolist() == [[1, 2]] and gone.tolist() == [[0, 3, 4]]


@pytest.mark.parametrize("fuse", ["sum", "mean"])
def test_fused_token_against_a_loop(fuse: str) -> None:
    x, scores = torch.randn(2, 1 + 6, 5), torch.rand(2, 6)
    after = drop(start(x, 1), scores, block=0, keep_rate=0.5, fuse=fuse)
    for b in range(2):
        gone = sorted(range(6), key=lambda i: -scores[b, i])[3:]
        weights = torch.tensor([scores[b, i] for i in gone])
        if fuse == "mean":
            weights = weights / weights.sum()
        expected = sum(w * x[b, 1 + i] for w, i in zip(weights, gone, strict=True))
        torch.testing.assert_close(after.x_BND[b, -1], expected)


def test_a_mean_token_is_protected_and_a_sum_token_competes() -> None:
    x = torch.randn(1, 8, 3)
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1, 0.1]])
    mean = drop(start(x, 0), scores, block=0, keep_rate=0.5, fuse="mean")
    assert (mean.num_ordinary, mean.num_protected) == (4, 1)
    again = drop(mean, torch.rand(1, 4), block=1, keep_rate=0.5, fuse="mean")
    assert (again.num_ordinary, again.num_protected) == (2, 2)
    torch.testing.assert_close(again.x_BND[:, 2], mean.x_BND[:, 4])

    summed = drop(start(x, 0), scores, block=0, keep_rate=0.5, fuse="sum")
    assert summed.num_ordinary == 5 and summed.patch_BM[0, -1] == -1
    low_fused = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.0]])
    assert (drop(summed, low_fused, block=1, keep_rate=0.6, fuse="none").patch_BM >= 0).all()


def test_scores_of_an_earlier_block_follow_their_tokens() -> None:
    x, scores = torch.randn(2, 6, 3), torch.rand(2, 6)
    state = replace(start(x, 0), scores_BM=scores)
    after = drop(state, scores, block=0, keep_rate=0.5, fuse="sum")
    kept = take(scores, after.stages[0].keep_idx_BK)
    assert after.scores_BM is not None
    torch.testing.assert_close(after.scores_BM[:, :-1], kept)
    torch.testing.assert_close(after.scores_BM[:, -1], scores.sum(1) - kept.sum(1))


def test_transfer_adds_what_the_most_similar_kept_token_gained() -> None:
    x = torch.zeros(1, 4, 2)
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.1]]])
    state = drop(
        start(x, 0),
        torch.tensor([[4.0, 3.0, 2.0, 1.0]]),
        block=0,
        keep_rate=0.5,
        fuse="none",
        remember=("dropped", "kept"),
        keys_BMd=keys,
    )
    gained = replace(state, x_BND=torch.tensor([[[10.0, 0.0], [0.0, 20.0]]]))
    restored = restore(gained, "transfer", (2, 2)).x_BND
    assert restored[0].tolist() == [[10, 0], [0, 20], [0, 20], [10, 0]]


def test_interpolation_of_a_linear_field_is_close_and_ignores_fused_tokens() -> None:
    grid = (6, 6)
    field = (torch.arange(36) // 6).float().view(1, 36, 1)
    scores = torch.tensor([[1.0 if (i // 6 + i % 6) % 2 == 0 else 0.0 for i in range(36)]])
    state = drop(start(field, 0), scores, block=0, keep_rate=0.5, fuse="sum", remember=("dropped", "kept"))
    restored = restore(state, "interpolate", grid).x_BND
    inner = restored.view(6, 6)[1:-1, 1:-1]
    torch.testing.assert_close(inner, field.view(6, 6)[1:-1, 1:-1])


def test_provenance_of_kept_and_fused_tokens() -> None:
    x = torch.randn(1, 6, 2)
    scores = torch.tensor([[0.3, 0.25, 0.2, 0.1, 0.1, 0.05]])
    state = drop(start(x, 0), scores, block=0, keep_rate=0.5, fuse="sum")
    state = drop(state, torch.tensor([[0.5, 0.1, 0.3, 0.2]]), block=1, keep_rate=0.75, fuse="none")
    sources = token_sources(state.stages, 6)
    torch.testing.assert_close(sources @ x, state.x_BND)
    assert sources[0, 0].tolist() == [1, 0, 0, 0, 0, 0]
    masks = patches_kept(state.stages, (2, 3))
    assert masks[0].tolist() == [[True, True, True, False, False, False]]
    assert masks[1].tolist() == [[True, False, True, False, False, False]]


@given(st.integers(0, 2), st.integers(4, 30), st.lists(rates, min_size=0, max_size=3), st.lists(fuses, min_size=3))
@example(num_prefix=0, num_patches=4, keep_rates=[0.5, 0.25], fuse=["sum", "merge", "sum"])
def test_every_token_knows_the_patches_that_it_stands_for(num_prefix, num_patches, keep_rates, fuse) -> None:
    x = torch.randn(2, num_prefix + num_patches, 3)
    state = start(x, num_prefix)
    for block, rate in enumerate(keep_rates):
        scores, keys = torch.rand(2, state.num_ordinary), torch.randn(2, state.num_ordinary, 3)
        state = drop(
            state, scores, block=block, keep_rate=rate, fuse=fuse[block], remember=("dropped", "kept"), keys_BMd=keys
        )
        sources = state.sources()
        torch.testing.assert_close(sources @ x[:, num_prefix:], state.x_BND[:, num_prefix:], rtol=1e-4, atol=1e-5)
        if state.stages:
            alone = state.stages[-1].patch_after_BN
            assert alone.shape == sources.shape[:2]
            rows, columns = (alone >= 0).nonzero(as_tuple=True), alone[alone >= 0]
            if "merge" in fuse[: block + 1]:
                assert (sources[rows].gather(1, columns[:, None]) > 0).all()
                if "sum" not in fuse[:block]:  # into a mean of patches; a fused one brings its raw scores
                    torch.testing.assert_close(sources[rows].sum(1), torch.ones(len(columns)))
            else:
                assert torch.equal(sources[rows], torch.eye(num_patches)[columns])
            assert ((sources > 0).sum(1) <= 1).all()  # no patch is in two tokens
    restored = restore(state, "bypass", (1, num_patches))
    assert torch.equal(restored.sources(), torch.eye(num_patches).expand(2, -1, -1))
    assert [s.block for s in restored.drops] == [s.block for s in state.drops] == [s.block for s in state.stages]
    assert restored.stages == ()


@given(st.integers(0, 2), st.integers(4, 30), st.lists(rates, min_size=1, max_size=3))
def test_merging_keeps_the_sum_of_all_tokens_and_unmerging_copies_it_back(num_prefix, num_patches, keep_rates) -> None:
    x = torch.randn(2, num_prefix + num_patches, 3, dtype=torch.float64)
    state = replace(start(x, num_prefix), scores_BM=torch.rand(2, num_patches))
    attention = state.scores_BM.sum(1)
    for block, rate in enumerate(keep_rates):
        scores, keys = torch.rand(2, state.num_ordinary), torch.randn(2, state.num_ordinary, 3)
        state = drop(
            state, scores, block=block, keep_rate=rate, fuse="merge", remember=("dropped", "kept"), keys_BMd=keys
        )
    size_BN = state.token_sizes()
    if size_BN is None:  # nothing was dropped
        size_BN = torch.ones(2, num_prefix + num_patches)
    assert (size_BN[:, num_prefix:].sum(1) == num_patches).all() and (size_BN[:, :num_prefix] == 1).all()
    torch.testing.assert_close((size_BN.unsqueeze(2) * state.x_BND).sum(1), x.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.scores_BM.sum(1), attention)
    restored = restore(state, "unmerge", (1, num_patches))
    members = (state.sources() > 0).double()  # every patch is in exactly one token
    assert (members.sum(1) == 1).all()
    assert torch.equal(restored.x_BND[:, num_prefix:], members.transpose(1, 2) @ state.x_BND[:, num_prefix:])


def test_merging_against_a_loop() -> None:
    x, keys, scores = torch.randn(1, 6, 2), torch.randn(1, 6, 3), torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    state = drop(start(x, 0), scores, block=0, keep_rate=0.5, fuse="merge", keys_BMd=keys)
    groups: dict[int, list[int]] = {0: [0], 1: [1], 2: [2]}
    for i in (3, 4, 5):
        alike = [torch.cosine_similarity(keys[0, i], keys[0, k], dim=0) for k in range(3)]
        groups[max(range(3), key=alike.__getitem__)].append(i)
    for k, members in groups.items():
        torch.testing.assert_close(state.x_BND[0, k], x[0, members].mean(0))
        assert state.size_BM[0, k] == len(members)


@given(st.integers(0, 3), st.integers(2, 40), st.lists(rates, min_size=1, max_size=3), st.integers(1, 2))
def test_tokens_aside_come_back_as_they_are_by_then(num_prefix, num_patches, keep_rates, times) -> None:
    x = marked_tokens(2, num_prefix, num_patches).requires_grad_()
    state = start(x, num_prefix)
    for block, rate in enumerate(keep_rates):
        scores = torch.rand(len(state.x_BND), state.num_ordinary)
        state = drop(state, scores, block=block, keep_rate=rate, fuse="none", aside=True)
        if state.aside_BRD is not None:  # everything moves on by the same
            state = replace(state, aside_BRD=state.aside_BRD + 1)
        state = replace(state, x_BND=state.x_BND + 1).repeat(times if block == 0 else 1)
    num_drops = len(state.stages)
    restored = restore(state, "bypass", (1, num_patches))
    assert torch.equal(restored.x_BND, torch.cat([x + len(keep_rates)] * times)) or num_drops < len(keep_rates)
    assert restored.aside_BRD is None and restored.stages == ()
    restored.x_BND.sum().backward()
    kept = state.patch_BM[:2]
    grad = x.grad[:, num_prefix:, 0]
    assert (grad.gather(1, kept) == times).all() or times == 2
    assert (grad > 0).sum() >= kept.numel()
    if times == 1:
        assert (grad > 0).sum() == kept.numel()
