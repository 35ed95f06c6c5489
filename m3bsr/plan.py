"""The plan of a reprogramming: what trains, where tokens are dropped, how, and how they come back."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal

FUSE = ("sum", "mean", "none")
SCORE_SOURCE = ("frozen", "own")
SCHEDULE = ("constant", "cosine")
RESTORE = ("bypass", "adapt", "interpolate", "transfer")
RECOMPUTE = ("none", "frozen")


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
    fuse: Literal["sum", "mean", "none"] = "sum"
    """What becomes of dropped tokens: one token weighted by raw scores, or by normalised ones, or nothing."""
    score_source: Literal["frozen", "own"] = "frozen"
    """Whose attention scores the tokens: the nearest frozen block, or the dropping block itself."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Keep rate in training: constant, or a cosine from 1 down to keep_rate over schedule_steps."""
    schedule_steps: int = 0
    """Steps of the cosine schedule."""
    restore: Literal["bypass", "adapt", "interpolate", "transfer"] = "transfer"
    """How dropped tokens come back for dense tasks."""
    restore_before: int | None = None
    """Block before which the whole grid is restored, so that the blocks behind it mend it."""
    recompute: Literal["none", "frozen"] = "none"
    """Recompute frozen blocks in the backward pass instead of storing their activations."""

    def __post_init__(self) -> None:
        for name, known in (
            ("fuse", FUSE),
            ("score_source", SCORE_SOURCE),
            ("schedule", SCHEDULE),
            ("restore", RESTORE),
            ("recompute", RECOMPUTE),
        ):
            _one_of(name, getattr(self, name), known)
        if self.train_blocks != "all":
            if isinstance(self.train_blocks, str):
                raise ValueError(f'bsr.train_blocks must be "all" or a tuple of blocks, got {self.train_blocks!r}')
            object.__setattr__(self, "train_blocks", _blocks("train_blocks", self.train_blocks))
        object.__setattr__(self, "drop_blocks", _blocks("drop_blocks", self.drop_blocks))
        self._check_rates()
        self._check_experts()
        if self.schedule == "cosine" and self.schedule_steps < 1:
            raise ValueError(f"bsr.schedule_steps must be positive with a cosine schedule, got {self.schedule_steps}")
        if self.schedule_steps < 0:
            raise ValueError(f"bsr.schedule_steps must not be negative, got {self.schedule_steps}")
        if self.restore_before is not None and any(block >= self.restore_before for block in self.drop_blocks):
            raise ValueError(
                f"bsr.restore_before {self.restore_before} must come after the last drop block ({self.drop_blocks[-1]})"
            )

    def _check_rates(self) -> None:
        rates = self.keep_rate if isinstance(self.keep_rate, tuple | list) else (self.keep_rate,)
        for rate in rates:
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
                raise ValueError(f"bsr.keep_rate must lie in (0, 1], got {rate!r}")
        if isinstance(self.keep_rate, tuple | list):
            if len(self.keep_rate) != len(self.drop_blocks):
                raise ValueError(
                    f"bsr.keep_rate has {len(self.keep_rate)} values for {len(self.drop_blocks)} drop blocks; "
                    f"give one number, or one per drop block"
                )
            object.__setattr__(self, "keep_rate", tuple(map(float, self.keep_rate)))

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

    def keep_rate_at(self, block: int, step: int | None = None) -> float:
        """Keep rate of a drop block at a training step; ``None``: the final one (EViT's schedule, without warm-up)."""
        final = self.keep_rates[block]
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
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Inverse of :meth:`to_dict`, also after JSON made lists of the tuples.

        Raises:
            ValueError: an unknown field (with the nearest known one), or a bad value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in data:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ValueError(f"unknown field bsr.{name}" + (f"; did you mean {near[0]}?" if near else ""))
        return cls(**{name: _tuples(value) for name, value in data.items()})


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"bsr.{name} must be one of {', '.join(known)}, got {value!r}{hint}")


def _blocks(name: str, values: Any) -> tuple[int, ...]:
    """Distinct non-negative integers, sorted."""
    try:
        blocks = tuple(values)
    except TypeError:
        raise ValueError(f"bsr.{name} must be a tuple of integers, got {values!r}") from None
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, int) or block < 0:
            raise ValueError(f"bsr.{name} must hold integers from 0, got {block!r}")
    if len(set(blocks)) != len(blocks):
        raise ValueError(f"bsr.{name} names a number twice: {blocks}")
    return tuple(sorted(blocks))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
