"""The plan of a reprogramming: what trains, where tokens are dropped, how, and how they come back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from m3bsr.utils.checks import check_fields, check_known, check_not_negative, check_share, tuples

Fuse = Literal["sum", "mean", "none", "merge"]
DropFrom = Literal["both", "backward"]
ScoreSource = Literal["frozen", "own"]
Schedule = Literal["constant", "cosine"]
Restore = Literal["bypass", "adapt", "interpolate", "transfer", "unmerge"]
Recompute = Literal["none", "cheap", "frozen", "both", "all"]
ActivationDtype = Literal["same", "bf16", "int8"]
FUSE: tuple[str, ...] = get_args(Fuse)
SCORE_SOURCE: tuple[str, ...] = get_args(ScoreSource)
# What drops do for dense tasks: the least loss for the work that they save, as measured on NYUD (LOG.md).
MERGED: dict[str, Any] = {"select": "similar", "fuse": "merge", "restore": "unmerge"}


@dataclass(frozen=True)
class Plan:
    """Everything that block selective reprogramming can be told. Blocks and experts are 0-based.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    train_blocks: Literal["all"] | tuple[int, ...] = "all"
    """Blocks that train, beside the final norm and the heads; "all": every parameter (full fine-tuning)."""
    train_experts: str | tuple[tuple[int, ...], ...] = "all"
    """In trained MoE blocks: "all", one tuple of experts per block, or "top:n" (the n most used, measured first)."""
    drop_blocks: tuple[int, ...] = ()
    """Blocks that drop tokens between their attention and their MLP; never the last one."""
    keep_rate: float | tuple[float, ...] = 1.0
    """Share of tokens that a drop keeps, in (0, 1]: one number, or one per drop block."""
    select: str = "score"
    """Which tokens a drop keeps (a name in m3bsr.bsr.SELECTORS): score (of attention), cover, spread, random (each part
    of the image keeps some), similar (those without a near-double)."""
    drop_from: DropFrom = "both"
    """What dropped tokens leave: "both" passes, or the "backward" pass only: they go on without gradients, nothing of
    them is stored, and every task and evaluation sees all tokens (fuse and restore are without meaning then)."""
    fuse: Fuse = "sum"
    """What becomes of dropped tokens: one token weighted by raw scores ("sum"), or by normalised ones ("mean"), nothing
    ("none"), or each is averaged into the kept token most like it by key ("merge", as in ToMe)."""
    proportional: bool = False
    """Merged tokens weigh in attention by the number of patches that they stand for."""
    score_source: ScoreSource = "frozen"
    """Whose attention scores the tokens: the nearest frozen block, or the dropping block itself."""
    schedule: Schedule = "constant"
    """Keep rate in training: constant, or a cosine from 1 down to keep_rate over schedule_steps."""
    schedule_steps: int = 0
    """Steps of the cosine schedule."""
    restore: Restore = "transfer"
    """How dropped tokens come back for dense tasks."""
    restore_before: int | None = None
    """Block before which the whole grid is restored, so that the blocks behind it mend it."""
    recompute: Recompute = "none"
    """Computed again in the backward pass instead of stored: "cheap": the MLP's hidden layer in frozen blocks, the
    outputs of LayerNorm and GELU in trained ones; "frozen": frozen blocks as a whole; "both"; "all": every block as a
    whole, trained or not (gradient checkpointing)."""
    activation_dtype: ActivationDtype = "same"
    """In what autograd stores the large activations of the blocks: as computed, bfloat16, or 8 bits (groups of 64)."""
    prune_rate: float = 0.0
    """Share in [0, 1) of the inputs of Linears and LayerNorms that is not stored, smallest first (BackRazor)."""
    eval_keep_rate: float | None = None
    """Keep rate in evaluation, where tokens are cheap (nothing is stored), in (0, 1]; None: that of training."""
    cache_prefix: bool = False
    """Training keeps on disk what the frozen blocks before the first trained one give, and computes it only once for
    each of data.num_views (one if unset); read by tools/train.py, in run.cache_dir."""

    def __post_init__(self) -> None:
        check_fields(self, "bsr")
        if self.train_blocks != "all":
            object.__setattr__(self, "train_blocks", _blocks("train_blocks", self.train_blocks))
        self._check_rates()
        self._check_experts()
        if self.schedule == "cosine" and self.schedule_steps < 1:
            raise ValueError(f"bsr.schedule_steps must be positive with a cosine schedule, got {self.schedule_steps}")
        check_not_negative(self, "bsr", "schedule_steps", "restore_before")
        check_share(self, "bsr", "prune_rate")
        if self.proportional and self.merging != "merge":
            raise ValueError('bsr.proportional needs merged tokens: bsr.fuse "merge" and bsr.drop_from "both"')
        if self.restore_before is not None and any(block >= self.restore_before for block in self.drop_blocks):
            raise ValueError(
                f"bsr.restore_before {self.restore_before} must come after the last drop block ({self.drop_blocks[-1]})"
            )

    def _check_rates(self) -> None:
        check_share(self, "bsr", "keep_rate", "eval_keep_rate", bounds="(0, 1]")
        blocks, rates = _blocks("drop_blocks", self.drop_blocks), self.keep_rate
        if isinstance(rates, tuple):
            if len(rates) != len(blocks):
                raise ValueError(
                    f"bsr.keep_rate has {len(rates)} values for {len(blocks)} drop blocks; "
                    f"give one number, or one per drop block"
                )
            # Each rate stays with its block when the blocks are put in order.
            rate_of = dict(zip(self.drop_blocks, rates, strict=True))
            object.__setattr__(self, "keep_rate", tuple(float(rate_of[block]) for block in blocks))
        object.__setattr__(self, "drop_blocks", blocks)

    def _check_experts(self) -> None:
        experts = self.train_experts
        if isinstance(experts, str):
            head, _, number = experts.partition(":")
            if experts != "all" and not (head == "top" and number.isdecimal() and int(number) > 0):
                raise ValueError(f'bsr.train_experts must be "all", "top:n" or tuples of experts, got {experts!r}')
            return
        checked = tuple(_blocks("train_experts", per_block) for per_block in experts)
        object.__setattr__(self, "train_experts", checked)

    @property
    def keep_rates(self) -> dict[int, float]:
        """Final keep rate of every drop block."""
        rates = self.keep_rate if isinstance(self.keep_rate, tuple) else (self.keep_rate,) * len(self.drop_blocks)
        return dict(zip(self.drop_blocks, rates, strict=True))

    @property
    def merging(self) -> Fuse:
        """``fuse`` where dropped tokens leave the forward pass, else ``"none"``."""
        return self.fuse if self.drop_from == "both" else "none"

    def keep_rate_at(self, block: int, step: int | None = None, *, training: bool = True) -> float:
        """Keep rate of a drop block at a training step; ``None``: the final one (EViT's schedule, without warm-up).

        ``training=False``: that of evaluation.
        """
        final = self.keep_rates[block]
        if not training:
            if self.drop_from == "backward":
                return 1.0
            return final if self.eval_keep_rate is None else self.eval_keep_rate
        if step is None or self.schedule == "constant" or step >= self.schedule_steps:
            return final
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / self.schedule_steps))

    def validate_depth(self, depth: int) -> None:
        """Check the block numbers against a model of ``depth`` blocks.

        Raises:
            ValueError: a block out of range, or the last block dropping (its drop would change nothing but itself).
        """
        train = () if self.train_blocks == "all" else self.train_blocks
        before = () if self.restore_before is None else (self.restore_before,)
        for name, blocks in (("train_blocks", train), ("drop_blocks", self.drop_blocks), ("restore_before", before)):
            wrong = [block for block in blocks if not 0 <= block < depth]
            if wrong:
                raise ValueError(f"bsr.{name} {wrong} out of range: the model has blocks 0 to {depth - 1}")
        if depth - 1 in self.drop_blocks:
            raise ValueError(f"bsr.drop_blocks must not name the last block ({depth - 1}): no block follows its drop")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of :meth:`to_dict`, also after JSON made lists of the tuples.

        Raises:
            ValueError: an unknown field (with the nearest known one), or a bad value.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"bsr must hold the fields of a plan, got {data!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in data:
            check_known(name, known, "field bsr.")
        return cls(**{name: tuples(value) for name, value in data.items()})


def _blocks(name: str, blocks: Any) -> tuple[int, ...]:
    """Distinct non-negative integers, sorted."""
    for block in blocks:
        if block < 0:
            raise ValueError(f"bsr.{name} must hold integers from 0, got {block}")
    if len(set(blocks)) != len(blocks):
        raise ValueError(f"bsr.{name} names a number twice: {blocks}")
    return tuple(sorted(blocks))
