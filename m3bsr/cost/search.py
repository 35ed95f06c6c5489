"""The search behind ``suggest_plan`` and ``tools/plan.py``: which plan within a budget is worth most (see ``suggest``).

Information and costs may come from anywhere: measured, predicted, or equal for all blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from m3bsr.bsr.forward import block_roles
from m3bsr.bsr.tokens import num_kept
from m3bsr.cost.parts import BackboneShape
from m3bsr.plan import MERGED, Plan, Recompute

KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
MAX_DROPS = 3
RECOMPUTE: tuple[Recompute, ...] = ("none", "cheap", "both", "all")
# Sets of blocks that are all tried; beyond that one block after the other is added.
MAX_SETS = 3000


@dataclass(frozen=True)
class BlockRow:
    """What training one block brings and costs, alone and without drops."""

    block: int
    information: float
    """Share of all blocks' information."""
    compute: float
    """Weight gradients and the backward pass down to here, as a share of a full fine-tuning step's MACs."""
    stored_bytes: int
    """Stored for the backward pass beyond what the head alone stores, whole batch."""
    chosen: bool

    @property
    def ratio(self) -> float:
        """Information per compute."""
        return self.information / self.compute


@dataclass(frozen=True)
class PlanRow:
    """A candidate: what it is worth, its predicted cost, and what became of it."""

    plan: Plan
    coverage: float
    """Share of the information that the trained blocks stand for, in [0, 1]."""
    kept: float
    """Mean share of attention (or of tokens) that drops leave, in [0, 1]."""
    compute: float
    """MACs over those of a full fine-tuning step."""
    peak_bytes: int
    """Predicted peak of a training step with AdamW at the size of the first batch."""
    verdict: str

    @property
    def value(self) -> float:
        return self.coverage * self.kept


@dataclass(frozen=True)
class SuggestionTable:
    """What a suggestion rests on."""

    blocks: tuple[BlockRow, ...]
    plans: tuple[PlanRow, ...]

    def __str__(self) -> str:
        lines = ["block  information  compute  info/compute  stored, MB"]
        for row in self.blocks:
            lines.append(
                f"{row.block:>5}  {row.information:>11.3f}  {row.compute:>7.3f}  {row.ratio:>12.2f}  "
                f"{row.stored_bytes / 2**20:>10.1f}{'  trained' if row.chosen else ''}"
            )
        lines += ["", f"{'train':<12} {'drop':<12} {'keep':>4}  recompute  coverage   kept  value  compute  peak, MB"]
        for plan_row in self.plans:
            p = plan_row.plan
            train, drops = (" ".join(map(str, blocks)) or "-" for blocks in (p.train_blocks, p.drop_blocks))
            rate = f"{min(p.keep_rates.values()):.1f}" if p.drop_blocks else "-"
            lines.append(
                f"{train:<12} {drops:<12} {rate:>4}  {p.recompute:<9}  {plan_row.coverage:>8.3f}  {plan_row.kept:>5.3f}"
                f"  {plan_row.value:>5.3f}  {plan_row.compute:>7.3f}  {plan_row.peak_bytes / 2**20:>8.1f}"
                f"  {plan_row.verdict}"
            )
        return "\n".join(lines)


class Suggestion(NamedTuple):
    """``plan, table = suggest_plan(...)``; ``print`` shows both."""

    plan: Plan
    table: SuggestionTable

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.plan}"


class Costs(Protocol):
    """What plans cost: called with a plan, the share of a full step's MACs and the peak in bytes."""

    shape: BackboneShape
    batch_size: int

    def __call__(self, plan: Plan) -> tuple[float, int]: ...

    def stored(self, plan: Plan) -> int:
        """Bytes that the blocks store, whole batch."""


def search_plans(
    information: Sequence[float],
    mass: list[list[float]] | None,
    costs: Costs,
    num_blocks: int,
    allowed: tuple[int, ...],
    memory_bytes: int | None,
    compute: float | None,
    dense: bool,
) -> Suggestion:
    """The search behind :func:`suggest_plan`, with information and costs from anywhere.

    Args:
        information: of every block; only ratios matter.
        mass: per block the share of attention on its k + 1 best tokens; ``None``: every token counts the same.

    Raises:
        ValueError: nothing fits.
    """
    information = [share / sum(information) for share in information]
    depth, spacing = len(information), len(information) / num_blocks

    def coverage(chosen: Iterable[int]) -> float:
        chosen = tuple(chosen)
        return sum(info * max(math.exp(-abs(b - s) / spacing) for s in chosen) for b, info in enumerate(information))

    def row(plan: Plan, verdict: str) -> PlanRow:
        share, peak = costs(plan)
        assert plan.train_blocks != "all"
        return PlanRow(plan, coverage(plan.train_blocks), _kept(plan, mass, costs.shape), share, peak, verdict)  # type: ignore[arg-type]

    published = row(published_plan(depth, num_blocks, dense), "published choice, for comparison")
    if memory_bytes is None and compute is None:
        compute = published.compute
    rows: list[PlanRow] = []
    too_large: list[PlanRow] = []
    even: Any = published.plan.train_blocks
    sets = [*_sets(allowed, num_blocks, coverage), *([even] if set(even) <= set(allowed) else [])]
    for blocks in dict.fromkeys(sets):
        plans = sorted(_plans(blocks, depth, dense), key=lambda p: -_kept(p, mass, costs.shape))
        tried = []
        for option in (option for plan in plans for option in _recomputing(plan, memory_bytes)):
            candidate = row(option, "")
            if option.recompute == "all" and candidate.compute > 1:  # then rather checkpoint full fine-tuning
                continue
            tried.append(candidate)
            if _fits(tried[-1], memory_bytes, compute):
                rows.append(tried[-1])
                break
        else:
            too_large += tried
    if not rows:
        raise ValueError(_impossible(too_large, num_blocks, costs.batch_size, memory_bytes, compute))
    best = max(rows, key=lambda r: r.value)
    table = [
        PlanRow(**{**vars(r), "verdict": "taken: most coverage * kept that fits" if r is best else "fits"})
        for r in rows
    ]
    return Suggestion(best.plan, SuggestionTable(_block_rows(information, costs, best.plan), (*table, published)))


def _fits(row: PlanRow, memory_bytes: int | None, compute: float | None) -> bool:
    return (memory_bytes is None or row.peak_bytes <= memory_bytes) and (compute is None or row.compute <= compute)


def _sets(allowed: tuple[int, ...], num: int, coverage: Callable[[Iterable[int]], float]) -> Iterator[tuple[int, ...]]:
    """For every possible earliest block, the best set of ``num`` blocks from there on."""
    for place, first in enumerate(allowed[: len(allowed) - num + 1]):
        later = allowed[place + 1 :]
        if math.comb(len(later), num - 1) <= MAX_SETS:
            yield max(((first, *rest) for rest in itertools.combinations(later, num - 1)), key=coverage)
            continue
        chosen: tuple[int, ...] = (first,)
        while len(chosen) < num:
            chosen = max((tuple(sorted({*chosen, b})) for b in later if b not in chosen), key=coverage)
        yield chosen


def _plans(train: tuple[int, ...], depth: int, dense: bool) -> Iterator[Plan]:
    """Drops of all strengths that the search considers: up to three, evenly spaced from the first one to the end."""
    yield Plan(train_blocks=train)
    merged: dict[str, Any] = MERGED if dense else {}
    for first, number, rate in itertools.product(range(depth - 1), range(1, MAX_DROPS + 1), KEEP_RATES):
        drops = tuple(sorted({first + i * (depth - first) // number for i in range(number)}))
        if len(drops) < number or drops[-1] >= depth - 1:
            continue
        for source in ("frozen", "own"):
            plan = Plan(train_blocks=train, drop_blocks=drops, keep_rate=rate, score_source=source, **merged)  # type: ignore[arg-type]
            if _is_possible(plan, depth):
                yield plan
                break


def _is_possible(plan: Plan, depth: int) -> bool:
    try:
        block_roles(plan, depth)
    except ValueError:
        return False
    return True


def _recomputing(plan: Plan, memory_bytes: int | None) -> Iterator[Plan]:
    for level in RECOMPUTE if memory_bytes is not None else RECOMPUTE[:1]:
        yield Plan(**{**vars(plan), "recompute": level})


def published_plan(depth: int, num_blocks: int = 3, dense: bool = False) -> Plan:
    """Evenly spaced blocks, the last among them; drops at a quarter, half and three quarters keep .5 of the tokens.

    For dense tasks they keep .8, and the others are merged into those.
    """
    train = tuple(max(0, round((i + 1) * depth / num_blocks) - 1) for i in range(num_blocks))
    drops = tuple(sorted({depth * i // 4 for i in (1, 2, 3)} - {depth - 1}))
    if dense:
        return Plan(train_blocks=train, drop_blocks=drops, keep_rate=0.8, score_source="own", **MERGED)
    return Plan(train_blocks=train, drop_blocks=drops, keep_rate=0.5, score_source="own")


def _kept(plan: Plan, mass: list[list[float]] | None, shape: BackboneShape) -> float:
    """Mean over the blocks of the share of attention (or of tokens) that is left."""
    ordinary, left, shares = shape.num_patches, 1.0, []
    for block in range(shape.depth):
        if block == plan.restore_before:
            ordinary, left = shape.num_patches, 1.0
        if block in plan.drop_blocks:
            ordinary = num_kept(plan.keep_rates[block], ordinary)
            left = min(left, ordinary / shape.num_patches if mass is None else mass[block][ordinary - 1])
        shares.append(left)
    return sum(shares) / shape.depth


def _block_rows(information: Sequence[float], costs: Costs, plan: Plan) -> tuple[BlockRow, ...]:
    head, _ = costs(Plan(train_blocks=()))
    rows = []
    for block, share in enumerate(information):
        alone = Plan(train_blocks=(block,))
        chosen = plan.train_blocks != "all" and block in plan.train_blocks
        rows.append(BlockRow(block, share, costs(alone)[0] - head, costs.stored(alone), chosen))
    return tuple(rows)


def _impossible(
    rows: list[PlanRow], num_blocks: int, batch_size: int, memory_bytes: int | None, compute: float | None
) -> str:
    limits = {
        "memory_bytes": (memory_bytes, min(row.peak_bytes for row in rows)),
        "compute": (compute, math.ceil(min(row.compute for row in rows) * 1e4) / 1e4),
    }
    for name, (budget, least) in limits.items():
        if budget is not None and budget < least:
            return (
                f"{name}={budget} is too little to train {num_blocks} blocks with batches of {batch_size}: "
                f"the smallest possible is {least}; train fewer blocks or use smaller batches"
            )
    least_both = min(row.compute for row in rows if memory_bytes is None or row.peak_bytes <= memory_bytes)
    return (
        f"memory_bytes={memory_bytes} and compute={compute} cannot be met together for {num_blocks} blocks: within "
        f"that memory the smallest compute is {math.ceil(least_both * 1e4) / 1e4}"
    )
