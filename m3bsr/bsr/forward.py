"""The forward pass of a reprogrammed ViT: timm's blocks, one after the other, with drops between attention and MLP.

``run_blocks`` is the whole method on one screen. It works on timm's ``Block`` modules as they are and holds no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from m3bsr.bsr.attention import Attended, ScoreKind, attend, check_attention
from m3bsr.bsr.restore import NEEDS, restore
from m3bsr.bsr.selectors import SELECTORS
from m3bsr.bsr.storage import Packer, Run, Storage, call, choose_storage, lean_mlp, lean_qkv
from m3bsr.bsr.tokens import TokenState, drop
from m3bsr.plan import Plan
from m3bsr.utils.lookup import lookup

RunMLP = Callable[[int, nn.Module, Tensor, Tensor | None], Tensor]
Fork = Callable[[int, TokenState], TokenState]
Tap = Callable[[int, TokenState], None]


def plain_mlp(index: int, mlp: nn.Module, x_BND: Tensor, before_BND: Tensor | None) -> Tensor:
    return mlp(x_BND)


def no_fork(index: int, state: TokenState) -> TokenState:
    return state


def no_tap(index: int, state: TokenState) -> None:
    pass


@dataclass(frozen=True)
class BlockRoles:
    """What each block does under a plan, worked out once."""

    trained: tuple[bool, ...]
    score_of: dict[int, int]
    """Drop block -> the block whose attention scores it uses."""

    @property
    def first_trained(self) -> int:
        """Index of the first trained block, ``depth`` if there is none."""
        return next((i for i, trained in enumerate(self.trained) if trained), len(self.trained))

    def scores(self, index: int) -> bool:
        return index in self.score_of.values()


def block_roles(plan: Plan, depth: int) -> BlockRoles:
    """Work out which blocks train and which score.

    Raises:
        ValueError: a block out of range, the last block dropping, an unknown selector, or (``score_source="frozen"``) a
            trained drop block without a frozen block before it.
    """
    plan.validate_depth(depth)
    lookup(SELECTORS, plan.select, "bsr.select")
    trained = tuple(plan.train_blocks == "all" or i in plan.train_blocks for i in range(depth))
    score_of = {}
    for block in plan.drop_blocks:
        source = block
        if plan.score_source == "frozen":
            while source >= 0 and trained[source]:
                source -= 1
            if source < 0:
                raise ValueError(
                    f'bsr.score_source "frozen" needs a frozen block at or before drop block {block}, but blocks 0 to '
                    f'{block} are all trained; use score_source="own" or train later blocks'
                )
        score_of[block] = source
    return BlockRoles(trained, score_of)


def run_blocks(
    blocks: Sequence[nn.Module],
    state: TokenState,
    plan: Plan,
    roles: BlockRoles,
    *,
    keep_rates: dict[int, float],
    grid: tuple[int, int],
    has_class_token: bool,
    restorable: bool = False,
    training: bool = False,
    adapters: nn.ModuleDict | None = None,
    run_mlp: RunMLP = plain_mlp,
    fork: Fork = no_fork,
    want_before: Collection[int] = (),
    first: int = 0,
    stop: int | None = None,
    tap: Tap = no_tap,
) -> TokenState:
    """Run all blocks, or those from ``first`` up to but not with ``stop``.

    Args:
        blocks: timm blocks; only those that drop or score must be plain ``Block`` modules.
        state: tokens after the embedding, or behind block ``first - 1``.
        keep_rates: keep rate of each drop block at this step (see ``Plan.keep_rate_at``).
        grid: patches per column and row, for restoring.
        restorable: record what dropped tokens need to come back.
        training: whether the choice of tokens may be random.
        run_mlp: called for the MLP of each block, so that a MoE layer can be told its tasks.
        fork: called right before each MLP; may multiply the batch (one copy per task).
        want_before: blocks whose ``run_mlp`` is also given the tokens as they entered the block, before attention
            (those that are still there, fused with the same weights as the tokens themselves).
        tap: given the tokens behind each block, drops in force and all; a decoder of several levels takes them here.
    """
    packer, selector = Packer.of(plan), SELECTORS[plan.select]
    dropping = partial(
        drop,
        fuse=plan.merging,
        rank=selector.rank,
        grid=grid,
        remember=NEEDS[plan.restore] if restorable else (),
        aside=plan.drop_from == "backward",
        training=training,
    )
    for i in range(first, len(blocks) if stop is None else stop):
        block = blocks[i]
        if i == plan.restore_before:
            state = restore(state, plan.restore, grid, adapters)
        if not isinstance(block, Block):
            state = _run_other(block, i, state, roles)
            tap(i, state)
            continue
        # The block's own way to run its halves gathers weights that are spread over processes, or compiles.
        run_half: Run = getattr(block, "run_half", call)
        with_graph = i >= roles.first_trained and torch.is_grad_enabled()
        store = choose_storage(plan, packer, block, roles.trained[i]) if with_graph else Storage()
        needs_keys = i in roles.score_of and needs_match(plan, restorable)
        kind: ScoreKind = "none" if not roles.scores(i) else ("class_row" if has_class_token else "received")

        attended: Attended = run_half(
            store.attention,
            attention_half,
            block,
            i,
            state.x_BND,
            kind,
            state.num_prefix,
            needs_keys or (i in roles.score_of and selector.needs_keys),
            store.stretch,
            state.aside_BRD,
            state.token_sizes() if plan.proportional else None,
        )
        state = replace(
            state,
            x_BND=attended.x_BND,
            aside_BRD=attended.aside_BRD,
            before_BND=state.x_BND if i in want_before else None,
            aside_before_BRD=state.aside_BRD if i in want_before else None,
        )
        scores, keys = (_ordinary(t, state) for t in (attended.scores_BM, attended.keys_BMd))
        del attended  # its tokens aside would outlive the MLP
        if scores is not None and plan.score_source == "frozen":
            scores = scores.detach()
            state = replace(state, scores_BM=scores)
        if i in roles.score_of:
            used = state.scores_BM if plan.score_source == "frozen" else scores
            assert used is not None
            # No name for the partial either: it would keep the tokens as they were before the drop.
            state = store.drop(
                _drop,
                block,
                i,
                state.x_BND,
                partial(dropping, state, used, keep_rate=keep_rates[i], keys_BMd=keys),
            )
        state = fork(i, state)
        if state.aside_BRD is not None:  # first, so that what run_mlp remembers is of the tokens that learn
            with torch.no_grad():
                state = replace(
                    state,
                    aside_BRD=mlp_half(block, i, state.aside_BRD, state.aside_before_BRD, run_mlp, call),
                    aside_before_BRD=None,
                )
        # No name for the result: it would keep these tokens alive while the next block runs.
        state = replace(
            state,
            x_BND=run_half(store.mlp, mlp_half, block, i, state.x_BND, state.before_BND, run_mlp, store.stretch),
            before_BND=None,
        )
        tap(i, state)
    if plan.drop_from == "backward" and state.stages and stop is None:  # nothing has left the forward pass
        state = restore(state, plan.restore, grid)
    return state


def needs_match(plan: Plan, restorable: bool) -> bool:
    """Whether a drop looks for the most similar kept token of every dropped one."""
    if plan.drop_from == "backward":
        return False
    return plan.fuse == "merge" or (restorable and plan.restore in ("transfer", "unmerge"))


def _run_other(block: nn.Module, index: int, state: TokenState, roles: BlockRoles) -> TokenState:
    """A block that is not timm's ``Block`` takes and gives tokens, and that is all that is known of it."""
    name = f"block {index} is a {type(block).__name__}"
    if index in roles.score_of or roles.scores(index):
        raise ValueError(f"{name}; only timm's Block can drop or score tokens")
    if state.aside_BRD is not None:
        raise ValueError(f"{name}; behind a drop from the backward pass only timm's Block can run")
    return replace(state, x_BND=block(state.x_BND))


def attention_half(
    block: Block,
    index: int,
    x_BND: Tensor,
    kind: ScoreKind,
    num_prefix: int,
    want_keys: bool,
    stretch: Run,
    aside_BRD: Tensor | None,
    size_BN: Tensor | None,
) -> Attended:
    plain = kind == "none" and not want_keys and aside_BRD is None and size_BN is None
    if plain and not hasattr(block.attn, "head_dim"):
        return Attended(x_BND + block.drop_path1(block.ls1(block.attn(block.norm1(x_BND)))), None, None)
    attn = check_attention(block.attn, index)
    lean = stretch is not call and getattr(attn, "gate", None) is None  # a gate reads the normalised tokens again
    normed, qkv = (None, lean_qkv(block, x_BND, stretch)) if lean else (block.norm1(x_BND), None)
    with torch.no_grad():
        normed_aside = None if aside_BRD is None else block.norm1(aside_BRD)
    attended = attend(
        attn,
        normed,
        qkv_BNC=qkv,
        score=kind,
        num_prefix=num_prefix,
        want_keys=want_keys,
        aside_BRD=normed_aside,
        size_BN=size_BN,
    )
    aside = attended.aside_BRD
    if aside_BRD is not None and aside is not None:
        with torch.no_grad():
            aside = aside_BRD + block.drop_path1(block.ls1(aside))
    x_BND = x_BND + block.drop_path1(block.ls1(attended.x_BND))
    # Not _replace, which torch.compile of torch 2.11 cannot follow.
    return Attended(x_BND, attended.scores_BM, attended.keys_BMd, aside)


def _drop(block: Block, index: int, x_BND: Tensor, dropping: Callable[..., TokenState]) -> TokenState:
    """A drop with the arguments of half a block, which :class:`~m3bsr.bsr.storage.Packer` reads."""
    return dropping(block=index)


def mlp_half(
    block: Block, index: int, x_BND: Tensor, before_BND: Tensor | None, run_mlp: RunMLP, stretch: Run
) -> Tensor:
    lean = stretch is not call and type(block.mlp) is Mlp
    y_BND = lean_mlp(block, x_BND, stretch) if lean else run_mlp(index, block.mlp, block.norm2(x_BND), before_BND)
    return x_BND + block.drop_path2(block.ls2(y_BND))


def _ordinary(per_token: Tensor | None, state: TokenState) -> Tensor | None:
    """Cut the protected tokens off: nobody may drop them."""
    return None if per_token is None else per_token[:, : state.num_ordinary]
