"""Putting dropped tokens back where they came from, for dense tasks.

Stages are undone from the last to the first, so each step sees exactly the token list that its drop saw. Five ways to
give a dropped token its features (``Plan.restore``):

- ``bypass``: those that it had when it was dropped;
- ``adapt``: the same through a learned per-channel affine map of its stage, the identity at the start;
- ``interpolate``: the mean of the nearest kept patches, weighted by inverse squared distance in the image;
- ``transfer``: those that it had, plus what its most similar kept token (by key) has gained since;
- ``unmerge``: those of its most similar kept token.

Tokens that left the backward pass only are still there: they go back to their places as they are, whatever the way.

Shapes: B images, M ordinary tokens before the drop, K kept, R dropped, D channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from m3bsr.bsr.tokens import DropStage, TokenState, take

NUM_NEIGHBOURS = 4
NEEDS: dict[str, frozenset[str]] = {
    "bypass": frozenset({"dropped"}),
    "adapt": frozenset({"dropped"}),
    "interpolate": frozenset(),
    "transfer": frozenset({"dropped", "kept"}),
    "unmerge": frozenset(),
}
"""Features as they were at the drop that each way puts back or compares with; nothing else is kept alive."""


class StageAffine(nn.Module):
    """``x * weight + bias`` per channel, the identity at the start (the ``adapt`` way)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x_BRD: Tensor) -> Tensor:
        return x_BRD * self.weight + self.bias


def restore(state: TokenState, mode: str, grid: tuple[int, int], adapters: nn.ModuleDict | None = None) -> TokenState:
    """Undo every drop: ``[B, P + h*w, D]`` in image order, fused tokens gone.

    Args:
        state: after the blocks; its stages must remember what ``mode`` needs (``NEEDS``).
        mode: ``bypass``, ``adapt``, ``interpolate``, ``transfer`` or ``unmerge``.
        grid: patches per column and row ``(h, w)``.
        adapters: one :class:`StageAffine` per drop block, keyed by its number (``adapt`` only).
    """
    lean = [replace(stage, x_drop_BRD=None, x_keep_BKD=None) for stage in state.stages]
    for stage in reversed(state.stages):
        adapts = mode == "adapt" and adapters is not None and not stage.aside
        adapter = adapters[str(stage.block)] if adapts and adapters is not None else None
        state = undo(state, stage, mode, grid, adapter)
    return replace(state, stages=(), undone=(*state.undone, *lean), scores_BM=None)


def undo(
    state: TokenState, stage: DropStage, mode: str, grid: tuple[int, int], adapter: nn.Module | None = None
) -> TokenState:
    """Undo one drop, the last that is still in force; see :func:`restore`."""
    P, K, Q = stage.num_prefix, stage.keep_idx_BK.shape[1], stage.num_protected
    skip = 1 if stage.fuse == "sum" else 0
    prefix, kept = state.x_BND[:, :P], state.x_BND[:, P : P + K]
    protected = state.x_BND[:, P + K + skip : P + K + skip + Q]
    aside = state.aside_BRD
    if stage.aside:
        assert aside is not None
        left = aside.shape[1] - stage.drop_idx_BR.shape[1]
        dropped, aside = aside[:, left:], aside[:, :left] if left else None
    else:
        dropped = _features_of_dropped(stage, kept, mode, grid)
    if adapter is not None:
        dropped = adapter(dropped)
    # kept and dropped indices together are a permutation of the M places: its inverse puts each token back.
    place_BM = torch.cat([stage.keep_idx_BK, stage.drop_idx_BR], dim=1).argsort(dim=1)
    ordinary = take(torch.cat([kept, dropped.to(kept.dtype)], dim=1), place_BM)
    return replace(
        state,
        x_BND=torch.cat([prefix, ordinary, protected], dim=1),
        patch_BM=stage.patch_BM,
        num_protected=Q,
        size_BM=stage.size_BM,
        aside_BRD=aside,
    )


def _features_of_dropped(stage: DropStage, kept_BKD: Tensor, mode: str, grid: tuple[int, int]) -> Tensor:
    if mode == "unmerge":
        assert stage.match_BR is not None
        return take(kept_BKD, stage.match_BR)
    if mode == "interpolate":
        return interpolate(stage, kept_BKD, grid)
    assert stage.x_drop_BRD is not None, "the drop was not recorded as restorable"
    if mode in ("bypass", "adapt"):
        return stage.x_drop_BRD
    assert mode == "transfer" and stage.match_BR is not None and stage.x_keep_BKD is not None
    return stage.x_drop_BRD + take(kept_BKD - stage.x_keep_BKD, stage.match_BR)


def interpolate(stage: DropStage, kept_BKD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features ``[B, R, D]`` of the dropped patches from their nearest kept ones."""
    at_drop, at_keep = (take(stage.patch_BM, idx) for idx in (stage.drop_idx_BR, stage.keep_idx_BK))

    def coordinates(patch_BN: Tensor) -> Tensor:
        yx = torch.stack([patch_BN // grid[1], patch_BN % grid[1]], dim=-1).to(torch.float32)
        return yx.masked_fill(patch_BN.unsqueeze(-1) < 0, 1e6)  # a fused token is nobody's neighbour

    distance_BRK = torch.cdist(coordinates(at_drop), coordinates(at_keep))
    near, idx_BRk = distance_BRK.topk(min(NUM_NEIGHBOURS, distance_BRK.shape[-1]), dim=-1, largest=False)
    weight = 1 / near.clamp_min(1e-3) ** 2
    weight = (weight / weight.sum(-1, keepdim=True)).to(kept_BKD.dtype)
    B, R, k = idx_BRk.shape
    neighbours = take(kept_BKD, idx_BRk.reshape(B, R * k)).view(B, R, k, -1)
    return (weight.unsqueeze(-1) * neighbours).sum(2)
