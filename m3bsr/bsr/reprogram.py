"""``reprogram(vit, plan)``: any timm ``VisionTransformer``, adapted by block selective reprogramming.

The result is the same model (same modules, same parameters, same ``state_dict`` keys) seen through a subclass whose
``forward_features`` drops tokens. It stays an instance of the class that it was, so timm's helpers (layer decay
groups, EMA, feature extraction) go on working.

Source: BSR, arXiv 2405.10951; EViT, ICLR 2022 (fused token, keep-rate schedule).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from m3bsr.bsr.forward import BlockRoles, Fork, RunMLP, Tap, block_roles, no_fork, no_tap, plain_mlp, run_blocks
from m3bsr.bsr.prefix import Prefix
from m3bsr.bsr.restore import StageAffine
from m3bsr.bsr.tokens import TokenState, num_kept, start
from m3bsr.bsr.trainable import ParameterCount, count_parameters, set_trainable
from m3bsr.plan import Plan


@dataclass(frozen=True)
class Report:
    """What a plan makes of a model: parameters, and tokens (prefix and fused ones included) after each block."""

    name: str
    parameters: ParameterCount
    tokens_after_block: tuple[int, ...]
    plan: Plan

    def __str__(self) -> str:
        count = self.parameters
        share = count.trained / max(1, count.total)
        of = "of the backward pass " if self.plan.drop_from == "backward" else ""
        return "\n".join(
            (
                f"{self.name}: {count.trained:,} of {count.total:,} parameters train ({share:.1%}), "
                f"{count.frozen:,} frozen",
                f"trained blocks: {_numbers(self.plan.train_blocks)}, drop blocks: {_numbers(self.plan.drop_blocks)}",
                f"tokens {of}after each block: {_numbers(self.tokens_after_block)}",
            )
        )


def _numbers(values: tuple[int, ...] | str) -> str:
    return values if isinstance(values, str) else " ".join(map(str, values)) or "none"


def token_counts(plan: Plan, num_patches: int, num_prefix: int, depth: int) -> tuple[int, ...]:
    """Tokens after each block at the plan's final keep rates, prefix and fused tokens included; those that are left in
    the backward pass where only that one drops."""
    ordinary, protected, counts = num_patches, 0, []
    for block in range(depth):
        if block == plan.restore_before:
            ordinary, protected = num_patches, 0
        if block in plan.drop_blocks:
            kept = num_kept(plan.keep_rates[block], ordinary)
            if kept < ordinary:
                ordinary = kept + (plan.merging == "sum")
                protected += plan.merging == "mean"
        counts.append(num_prefix + ordinary + protected)
    return tuple(counts)


def tokens_left(plan: Plan, num_patches: int, num_prefix: int, depth: int) -> int:
    """Tokens behind the last block, nothing restored: all where drops leave the backward pass only."""
    if plan.drop_from == "backward":
        return num_prefix + num_patches
    return token_counts(plan, num_patches, num_prefix, depth)[-1]


class ReprogrammedMixin(VisionTransformer):
    """What a reprogrammed model can do beyond timm's; put before the model's own class."""

    plan: Plan
    roles: BlockRoles
    step: int

    def set_plan(self, plan: Plan) -> None:
        """Take on a plan: check it against this model, freeze and unfreeze parameters.

        Raises:
            ValueError: the plan does not fit (names the field).
        """
        roles = block_roles(plan, len(self.blocks))
        self.plan, self.roles, self.step = plan, roles, 0
        if plan.restore == "adapt" and plan.drop_blocks:
            known = getattr(self, "bsr_adapters", {})
            adapters = {b: known[b] if b in known else StageAffine(self.embed_dim) for b in map(str, plan.drop_blocks)}
            self.bsr_adapters = nn.ModuleDict(adapters).to(next(self.parameters()).device)
        set_trainable(self, plan)

    def set_step(self, step: int) -> None:
        """Tell the training step, for plans with a keep-rate schedule. Evaluation has its own rate."""
        self.step = step

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens before the first block ``[B, N, D]`` and the patch grid ``(h, w)``."""
        grid = self.patch_embed.dynamic_feat_size(images.shape[-2:])
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images)))), grid

    def forward_tokens(
        self,
        images: Tensor,
        *,
        restorable: bool = False,
        run_mlp: RunMLP = plain_mlp,
        fork: Fork = no_fork,
        want_before: Collection[int] = (),
        prefix: Prefix | None = None,
        stop: int | None = None,
        tap: Tap = no_tap,
    ) -> tuple[TokenState, tuple[int, int]]:
        """Images ``[B, 3, H, W]`` to the tokens behind the last block (before the final norm), and the patch grid.

        Args:
            prefix: tokens of these images behind the first blocks (``stop`` of another call), where they are known.
            stop: end before this block.
        """
        if prefix is None:
            x_BND, grid = self.embed(images)
            prefix = Prefix(start(x_BND, self.num_prefix_tokens), 0)
        else:
            grid = self.patch_embed.dynamic_feat_size(images.shape[-2:])
        rates = {b: self.plan.keep_rate_at(b, self.step, training=self.training) for b in self.plan.drop_blocks}
        state = run_blocks(
            list(self.blocks),
            prefix.state,
            self.plan,
            self.roles,
            keep_rates=rates,
            grid=grid,
            has_class_token=self.has_class_token,
            restorable=restorable or self.plan.restore_before is not None,
            training=self.training,
            adapters=getattr(self, "bsr_adapters", None),
            run_mlp=run_mlp,
            fork=fork,
            want_before=want_before,
            first=prefix.num_blocks,
            stop=stop,
            tap=tap,
        )
        return state, grid

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens that are left after the last block, normalised ``[B, N', D]``."""
        if attn_mask is not None or is_causal:
            raise ValueError("a reprogrammed model takes no attention mask")
        state, _ = self.forward_tokens(x)
        return self.norm(state.x_BND)

    @property
    def tokens_after_block(self) -> tuple[int, ...]:
        """Tokens after each block at the model's own image size."""
        return token_counts(self.plan, self.patch_embed.num_patches, self.num_prefix_tokens, len(self.blocks))

    def report(self) -> Report:
        """Trained and frozen parameters, tokens after each block."""
        return Report(type(self).__name__, count_parameters(self.parameters()), self.tokens_after_block, self.plan)


_RECAST_CLASSES: dict[tuple[type, type], type] = {}


def _recast_class(base: type[VisionTransformer], mixin: type[ReprogrammedMixin]) -> type[ReprogrammedMixin]:
    """The subclass of ``base`` with the mixin in front, made once per pair."""

    def reduce(self):  # a class made at run time cannot be found by name: pickle the recipe instead
        return _empty_instance, (base, mixin), self.__dict__

    if (base, mixin) not in _RECAST_CLASSES:
        name = mixin.__name__.removesuffix("Mixin") + base.__name__
        fields = {"__reduce__": reduce, "__module__": __name__}
        _RECAST_CLASSES[base, mixin] = type(name, (mixin, base), fields)
    return _RECAST_CLASSES[base, mixin]


def _empty_instance(base: type[VisionTransformer], mixin: type[ReprogrammedMixin]) -> ReprogrammedMixin:
    cls = _recast_class(base, mixin)
    return cls.__new__(cls)


def recast(vit: VisionTransformer, mixin: type[ReprogrammedMixin]) -> ReprogrammedMixin:
    """``vit`` as an instance of a subclass of its class and ``mixin``; modules and parameters are shared.

    Raises:
        ValueError: not a timm ``VisionTransformer``.
    """
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"block selective reprogramming needs a timm VisionTransformer, got {type(vit).__name__}")
    model = _empty_instance(type(vit), mixin)
    model.__dict__.update(vit.__dict__)  # the inner dicts of parameters and modules are shared, so both stay in step
    return model


def reprogram(vit: VisionTransformer, plan: Plan) -> ReprogrammedMixin:
    """Adapt a timm ``VisionTransformer`` by a plan.

    The parameters are shared with ``vit``, not copied: ``requires_grad`` is set on them, and training the result
    trains ``vit``. Calling it again on the result replaces the plan.

    Args:
        vit: any ``timm.models.vision_transformer.VisionTransformer`` (ViT, DeiT also distilled, DINOv2, SigLIP, ...).
        plan: which blocks train, which drop, how much, and how; see :class:`m3bsr.Plan`.

    Returns:
        A model with ``vit``'s call and ``state_dict`` keys, plus ``report()``, ``tokens_after_block``, ``plan``.

    Raises:
        ValueError: not a timm ``VisionTransformer``, or a plan that does not fit it.
    """
    model = vit if isinstance(vit, ReprogrammedMixin) else recast(vit, ReprogrammedMixin)
    model.set_plan(plan)
    return model


@contextmanager
def keep_rates_of_training(vit: Any) -> Iterator[None]:
    """Inside, evaluation drops what training drops, whatever ``plan.eval_keep_rate`` says: to look at."""
    plan = vit.plan
    vit.plan = replace(plan, eval_keep_rate=None)
    try:
        yield
    finally:
        vit.plan = plan
