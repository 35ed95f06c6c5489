"""Dropping tokens and putting them back: the bookkeeping, as pure functions.

Shapes: B images, N tokens = P prefix + M ordinary + Q protected; K of the M are kept, R = M - K dropped; D channels.
The order is always [prefix | ordinary, in image order, a "sum" fused token last | protected "mean" fused tokens].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from m3bsr.bsr.selectors.base import Candidates
from m3bsr.bsr.selectors.score import by_score


@dataclass(frozen=True)
class DropStage:
    """One drop: which tokens of the list before it stayed and which went, and what is needed to bring them back."""

    block: int
    num_prefix: int
    num_protected: int
    fuse: str
    keep_idx_BK: Tensor
    drop_idx_BR: Tensor
    patch_BM: Tensor
    """Patch index of every ordinary token before the drop; -1 for a fused token."""
    weight_BR: Tensor
    """Scores of the dropped tokens: their weights in the fused token."""
    x_drop_BRD: Tensor | None = None
    x_keep_BKD: Tensor | None = None
    match_BR: Tensor | None = None
    """For every dropped token the place in the kept list of the one whose key is most like its own."""
    size_BM: Tensor | None = None
    """Number of patches that every ordinary token stood for before the drop, where tokens merge."""
    aside: bool = False
    """The dropped tokens left the backward pass only; they are the last of ``TokenState.aside_BRD``."""

    @property
    def patch_after_BN(self) -> Tensor:
        """Patch index of every token behind the prefix after the drop (of a merged one that which it was); -1 for
        fused tokens."""
        patch_BK = take(self.patch_BM, self.keep_idx_BK)
        # a fused one among the ordinary is kept as any other
        num_fused = (self.fuse in ("sum", "mean")) + self.num_protected
        return torch.cat([patch_BK, patch_BK.new_full((len(patch_BK), num_fused), -1)], dim=1)

    def map(self, fn) -> DropStage:
        """The same stage with ``fn`` applied to every tensor."""
        return replace(self, **{k: fn(v) for k, v in vars(self).items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class TokenState:
    """Tokens on their way through the blocks; every one knows its place in the image."""

    x_BND: Tensor
    num_prefix: int
    patch_BM: Tensor
    num_protected: int = 0
    scores_BM: Tensor | None = None
    """Scores of the last frozen block that scored, for the ordinary tokens that are still there."""
    stages: tuple[DropStage, ...] = field(default=())
    undone: tuple[DropStage, ...] = field(default=())
    """Drops whose tokens are back already, without features: what the report shows."""
    before_BND: Tensor | None = None
    """The tokens as they entered the present block, if its MLP asks for them; they drop and fuse as the tokens do."""
    size_BM: Tensor | None = None
    """Number of patches that every ordinary token stands for; ``None``: one each."""
    aside_BRD: Tensor | None = None
    """Tokens that were dropped from the backward pass only: they go through the blocks without a graph."""
    aside_before_BRD: Tensor | None = None
    """What ``before_BND`` is to the tokens, for those aside."""

    @property
    def num_ordinary(self) -> int:
        return self.x_BND.shape[1] - self.num_prefix - self.num_protected

    @property
    def drops(self) -> tuple[DropStage, ...]:
        """Every drop so far, in force or undone, in order."""
        return self.undone + self.stages

    def token_sizes(self) -> Tensor | None:
        """Number of patches ``[B, N]`` that every token stands for, 1 for prefix and protected ones, or ``None``."""
        if self.size_BM is None:
            return None
        return torch.nn.functional.pad(self.size_BM, (self.num_prefix, self.num_protected), value=1.0)

    def sources(self) -> Tensor:
        """Provenance ``[B, N - P, patches]``: see :func:`token_sources`; every patch stands for itself before a drop
        and once the grid is restored."""
        if self.stages:
            return token_sources(self.stages, self.stages[0].patch_BM.shape[1])
        return torch.eye(self.num_ordinary, device=self.x_BND.device).expand(len(self.x_BND), -1, -1)

    def map(self, fn) -> TokenState:
        """The same state with ``fn`` applied to every tensor (``fn`` may only touch the batch dimension)."""
        tensors = {k: fn(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        stages, undone = (tuple(stage.map(fn) for stage in part) for part in (self.stages, self.undone))
        return replace(self, **tensors, stages=stages, undone=undone)

    def repeat(self, times: int) -> TokenState:
        """Stack ``times`` copies in the batch, copy-major (all images of copy 0 first)."""
        return self.map(lambda t: t.repeat(times, *[1] * (t.ndim - 1)))


def start(x_BND: Tensor, num_prefix: int) -> TokenState:
    """The state before the first block: nothing dropped, tokens in image order."""
    B, N, _ = x_BND.shape
    patch_BM = torch.arange(N - num_prefix, device=x_BND.device).expand(B, -1)
    return TokenState(x_BND, num_prefix, patch_BM)


def num_kept(keep_rate: float, num_tokens: int) -> int:
    """``ceil(keep_rate * num_tokens)``, safe against 0.55 * 100 = 55.000000000000007."""
    return min(num_tokens, max(1, math.ceil(keep_rate * num_tokens - 1e-9)))


def select(scores_BM: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """Indices of the ``num_keep`` highest scores and of the rest, each ascending; of equal scores the first wins."""
    order_BM = scores_BM.argsort(dim=1, descending=True, stable=True)
    return order_BM[:, :num_keep].sort(dim=1).values, order_BM[:, num_keep:].sort(dim=1).values


def take(x_BND: Tensor, idx_BK: Tensor) -> Tensor:
    """``x[b, idx[b, k]]`` for tensors ``[B, N]`` or ``[B, N, D]``."""
    B, N = x_BND.shape[:2]
    # index_select keeps only the indices for its backward pass; gather would keep all of x.
    rows = idx_BK + torch.arange(B, device=idx_BK.device).unsqueeze(1) * N
    return x_BND.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, idx_BK.shape)


def fuse_tokens(x_BRD: Tensor, weight_BR: Tensor, normalise: bool) -> Tensor:
    """One token ``sum_i w_i x_i`` ``[B, 1, D]``: raw scores (EViT, BSR) or weights that sum to one."""
    if normalise:
        weight_BR = weight_BR / weight_BR.sum(1, keepdim=True).clamp_min(1e-12)
    return torch.bmm(weight_BR.unsqueeze(1).to(x_BRD.dtype), x_BRD)


def merge_tokens(
    kept_BKD: Tensor, dropped_BRD: Tensor, match_BR: Tensor, size_keep_BK: Tensor, size_drop_BR: Tensor
) -> Tensor:
    """Mean ``[B, K, D]`` of every kept token and of the dropped ones that match it, weighted by sizes."""

    def add(to_BKD: Tensor, what_BRD: Tensor) -> Tensor:
        return to_BKD.scatter_add(1, match_BR.unsqueeze(2).expand_as(what_BRD), what_BRD.to(to_BKD.dtype))

    keep_BK1, drop_BR1 = size_keep_BK.unsqueeze(2), size_drop_BR.unsqueeze(2)
    total_BK1 = add(keep_BK1, drop_BR1)
    return add(kept_BKD * (keep_BK1 / total_BK1), dropped_BRD * (drop_BR1 / take(total_BK1, match_BR)))


def drop(
    state: TokenState,
    scores_BM: Tensor,
    *,
    block: int,
    keep_rate: float,
    fuse: str,
    rank: Callable[[Candidates], Tensor] = by_score,
    grid: tuple[int, int] | None = None,
    remember: Collection[str] = (),
    keys_BMd: Tensor | None = None,
    aside: bool = False,
    training: bool = False,
) -> TokenState:
    """Keep the ``ceil(keep_rate * M)`` ordinary tokens that rank highest; fuse or merge the others, or put them aside.

    Prefix and protected tokens stay. With every token kept the state comes back unchanged.

    Args:
        scores_BM: one score per ordinary token; gradients flow through them into the fused token unless detached.
        fuse: ``"sum"`` (an ordinary token, last), ``"mean"`` (protected from later drops), ``"none"``, or ``"merge"``
            (each into the kept token with the most similar key; needs ``keys_BMd``).
        rank: of a :class:`~m3bsr.bsr.selectors.Selector`; by default the scores decide.
        grid: patches per column and row; by default one row.
        remember: features that :mod:`m3bsr.bsr.restore` will need (its ``NEEDS``): of the ``"dropped"`` tokens, of the
            ``"kept"`` ones.
        keys_BMd: keys of the ordinary tokens; with them every dropped token remembers its most similar kept one.
        aside: dropped tokens go on without gradients (:attr:`TokenState.aside_BRD`); ``fuse`` must be ``"none"``.
        training: whether ranks may be random.
    """
    P, M, Q = state.num_prefix, state.num_ordinary, state.num_protected
    K = num_kept(keep_rate, M)
    if K == M:
        return state
    detached = scores_BM.detach()
    keep_idx, drop_idx = select(
        rank(Candidates(detached, state.patch_BM, K, grid or (1, M), keys_BMd, training)).detach(), K
    )
    weight = take(scores_BM, drop_idx)
    match = None if keys_BMd is None or aside else most_similar(take(keys_BMd, drop_idx), take(keys_BMd, keep_idx))
    size = state.size_BM
    if fuse == "merge" and size is None:
        size = scores_BM.new_ones(scores_BM.shape, dtype=torch.float32)

    def without_dropped(x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prefix, ordinary, protected = x_BND.split([P, M, Q], dim=1)
        kept, dropped = take(ordinary, keep_idx), take(ordinary, drop_idx)
        if fuse == "merge":
            assert match is not None and size is not None, "merging needs keys"
            kept = merge_tokens(kept, dropped, match, take(size, keep_idx), take(size, drop_idx))
        parts = [prefix, kept, protected]
        if fuse in ("sum", "mean"):
            parts.insert(2 if fuse == "sum" else 3, fuse_tokens(dropped, weight, normalise=fuse == "mean"))
        return torch.cat(parts, dim=1), kept, dropped

    x_BND, kept, dropped = without_dropped(state.x_BND)
    before, before_dropped = None, None
    if state.before_BND is not None:
        before, _, before_dropped = without_dropped(state.before_BND)
    stage = DropStage(
        block,
        num_prefix=P,
        num_protected=Q,
        fuse=fuse,
        keep_idx_BK=keep_idx,
        drop_idx_BR=drop_idx,
        patch_BM=state.patch_BM,
        weight_BR=weight.detach(),
        x_drop_BRD=dropped if "dropped" in remember and not aside else None,
        x_keep_BKD=kept if "kept" in remember and not aside else None,
        match_BR=match,
        size_BM=size,
        aside=aside,
    )
    if aside:
        assert fuse == "none", "tokens aside are still there"
        state = replace(
            state,
            aside_BRD=_behind(state.aside_BRD, dropped),
            aside_before_BRD=None if before_dropped is None else _behind(state.aside_before_BRD, before_dropped),
        )
    return replace(
        state,
        x_BND=x_BND,
        before_BND=before,
        patch_BM=_list_after(stage, state.patch_BM, -1),
        num_protected=Q + (fuse == "mean"),
        # What stands for several tokens has the attention, and the size, of them all.
        scores_BM=None if state.scores_BM is None else _list_after(stage, state.scores_BM),
        size_BM=None if size is None else _list_after(stage, size),
        stages=(*state.stages, stage),
    )


def _behind(aside_BRD: Tensor | None, dropped_BRD: Tensor) -> Tensor:
    return dropped_BRD.detach() if aside_BRD is None else torch.cat([aside_BRD, dropped_BRD.detach()], dim=1)


def _list_after(stage: DropStage, number_BM: Tensor, of_fused: int | None = None) -> Tensor:
    """A number per ordinary token, after a drop: those of kept ones, with that of what was merged into them added
    (unless ``of_fused`` is given), and behind them that of a "sum" token, ``of_fused`` or the sum over the dropped."""
    kept, dropped = take(number_BM, stage.keep_idx_BK), take(number_BM, stage.drop_idx_BR)
    if stage.fuse == "sum":
        last = dropped.sum(1, keepdim=True) if of_fused is None else kept.new_full((len(kept), 1), of_fused)
        return torch.cat([kept, last], dim=1)
    if stage.fuse == "merge" and of_fused is None:
        assert stage.match_BR is not None
        return kept.scatter_add(1, stage.match_BR, dropped)
    return kept


def most_similar(query_BRd: Tensor, key_BKd: Tensor) -> Tensor:
    """Index ``[B, R]`` of the key with the highest cosine similarity to each query."""
    query, key = (torch.nn.functional.normalize(t.float(), dim=-1) for t in (query_BRd, key_BKd))
    return (query @ key.transpose(1, 2)).argmax(dim=-1)


def patches_kept(stages: Sequence[DropStage], grid: tuple[int, int]) -> list[Tensor]:
    """For every stage a mask ``[B, h*w]`` of the patches that are still tokens of their own after it."""
    masks = []
    for stage in stages:
        patch_BK = take(stage.patch_BM, stage.keep_idx_BK)
        mask = torch.zeros(len(patch_BK), grid[0] * grid[1] + 1, dtype=torch.bool, device=patch_BK.device)
        masks.append(mask.scatter(1, patch_BK % mask.shape[1], True)[:, :-1])  # -1 (fused) lands in the extra column
    return masks


def token_sources(stages: tuple[DropStage, ...] | list[DropStage], num_patches: int) -> Tensor:
    """Weight ``[B, tokens, patches]`` with which each patch entered each token that is left (provenance).

    ``stages`` may be the first few only: what the tokens stood for after that drop (``stage.patch_after_BN`` tells
    which of them are fused). Rows are ordinary tokens, then protected ones; a kept patch has a single 1, a merged
    token the mean of its patches, a fused token the scores of the patches that it stands for (multiplied along a chain
    of fused tokens, normalised at each link when ``fuse="mean"``).
    """
    first = stages[0].patch_BM
    eye = torch.eye(num_patches, device=first.device).expand(len(first), -1, -1)
    ordinary, protected = eye, eye[:, :0]
    for stage in stages:
        kept, dropped = take(ordinary, stage.keep_idx_BK), take(ordinary, stage.drop_idx_BR)
        if stage.fuse == "none":
            ordinary = kept
            continue
        if stage.fuse == "merge":
            assert stage.match_BR is not None and stage.size_BM is not None
            sizes = (take(stage.size_BM, idx) for idx in (stage.keep_idx_BK, stage.drop_idx_BR))
            ordinary = merge_tokens(kept, dropped, stage.match_BR, *sizes)
            continue
        fused = fuse_tokens(dropped, stage.weight_BR, normalise=stage.fuse == "mean")
        if stage.fuse == "sum":
            ordinary = torch.cat([kept, fused], dim=1)
        else:
            ordinary, protected = kept, torch.cat([protected, fused], dim=1)
    return torch.cat([ordinary, protected], dim=1)
