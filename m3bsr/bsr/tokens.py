"""Dropping tokens and putting them back: the bookkeeping, as pure functions.

Shapes: B images, N tokens = P prefix + M ordinary + Q protected; K of the M are kept, R = M - K dropped; D channels.
The order is always [prefix | ordinary, in image order, a "sum" fused token last | protected "mean" fused tokens].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


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

    @property
    def patch_after_BN(self) -> Tensor:
        """Patch index of every token behind the prefix after the drop; -1 for fused tokens."""
        patch_BK = take(self.patch_BM, self.keep_idx_BK)
        num_fused = (self.fuse != "none") + self.num_protected  # a fused one among the ordinary is kept as any other
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

    @property
    def num_ordinary(self) -> int:
        return self.x_BND.shape[1] - self.num_prefix - self.num_protected

    @property
    def drops(self) -> tuple[DropStage, ...]:
        """Every drop so far, in force or undone, in order."""
        return self.undone + self.stages

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


def drop(
    state: TokenState,
    scores_BM: Tensor,
    *,
    block: int,
    keep_rate: float,
    fuse: str,
    restorable: bool = False,
    keys_BMd: Tensor | None = None,
) -> TokenState:
    """Keep the ``ceil(keep_rate * M)`` ordinary tokens with the highest scores; fuse the others into one token.

    Prefix and protected tokens stay. With every token kept the state comes back unchanged.

    Args:
        scores_BM: one score per ordinary token; gradients flow through them into the fused token unless detached.
        fuse: ``"sum"`` (an ordinary token, last), ``"mean"`` (protected from later drops) or ``"none"``.
        restorable: remember the dropped features, so that :mod:`m3bsr.bsr.restore` can put them back.
        keys_BMd: keys of the ordinary tokens; with them every dropped token remembers its most similar kept one.
    """
    P, M, Q = state.num_prefix, state.num_ordinary, state.num_protected
    K = num_kept(keep_rate, M)
    if K == M:
        return state
    keep_idx, drop_idx = select(scores_BM.detach(), K)
    weight = take(scores_BM, drop_idx)

    def without_dropped(x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prefix, ordinary, protected = x_BND.split([P, M, Q], dim=1)
        kept, dropped = take(ordinary, keep_idx), take(ordinary, drop_idx)
        parts = [prefix, kept, protected]
        if fuse != "none":
            parts.insert(2 if fuse == "sum" else 3, fuse_tokens(dropped, weight, normalise=fuse == "mean"))
        return torch.cat(parts, dim=1), kept, dropped

    x_BND, kept, dropped = without_dropped(state.x_BND)
    patch, scores = take(state.patch_BM, keep_idx), state.scores_BM
    scores = None if scores is None else take(scores, keep_idx)
    if fuse == "sum":
        patch = torch.cat([patch, patch.new_full((len(patch), 1), -1)], dim=1)
        if scores is not None and state.scores_BM is not None:
            # The fused token stands for the attention of all that it swallowed.
            scores = torch.cat([scores, take(state.scores_BM, drop_idx).sum(1, keepdim=True)], dim=1)
    stage = DropStage(block, P, Q, fuse, keep_idx, drop_idx, state.patch_BM, weight.detach())
    if restorable:
        stage = replace(stage, x_drop_BRD=dropped)
        if keys_BMd is not None:
            match = most_similar(take(keys_BMd, drop_idx), take(keys_BMd, keep_idx))
            stage = replace(stage, x_keep_BKD=kept, match_BR=match)
    return replace(
        state,
        x_BND=x_BND,
        before_BND=None if state.before_BND is None else without_dropped(state.before_BND)[0],
        patch_BM=patch,
        num_protected=Q + (fuse == "mean"),
        scores_BM=scores,
        stages=(*state.stages, stage),
    )


def most_similar(query_BRd: Tensor, key_BKd: Tensor) -> Tensor:
    """Index ``[B, R]`` of the key with the highest cosine similarity to each query."""
    query, key = (torch.nn.functional.normalize(t.float(), dim=-1) for t in (query_BRd, key_BKd))
    return (query @ key.transpose(1, 2)).argmax(dim=-1)


def patches_kept(stages: tuple[DropStage, ...] | list[DropStage], grid: tuple[int, int]) -> list[Tensor]:
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
    which of them are fused). Rows are ordinary tokens, then protected ones; a kept patch has a single 1, a fused token
    the scores of the patches that it stands for (multiplied along a chain of fused tokens, normalised at each link
    when ``fuse="mean"``).
    """
    first = stages[0].patch_BM
    eye = torch.eye(num_patches, device=first.device).expand(len(first), -1, -1)
    ordinary, protected = eye, eye[:, :0]
    for stage in stages:
        kept, dropped = take(ordinary, stage.keep_idx_BK), take(ordinary, stage.drop_idx_BR)
        if stage.fuse == "none":
            ordinary = kept
            continue
        fused = fuse_tokens(dropped, stage.weight_BR, normalise=stage.fuse == "mean")
        if stage.fuse == "sum":
            ordinary = torch.cat([kept, fused], dim=1)
        else:
            ordinary, protected = kept, torch.cat([protected, fused], dim=1)
    return torch.cat([ordinary, protected], dim=1)
