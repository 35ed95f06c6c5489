"""``suggest_plan``: which blocks to train and where to drop tokens, from measured gradients, within a budget.

What it optimises. A plan trains blocks S and drops tokens; it is worth ``coverage(S) * kept``, the most that fits wins:

* ``information(b)``: root of the empirical Fisher trace of block b, the root mean square norm of its gradient over
  small batches. To first order that is what a step of given length in this block takes off the loss. The head is fitted
  first: behind a random one, gradients say more about the head than about the blocks.
* ``coverage(S) = sum_b information(b) * max_{s in S} exp(-|b - s| / spacing)``, ``spacing = depth / num_blocks``.
  Blocks add to one residual stream, so a trained one can stand in for its neighbours, the less the farther they are.
  Without this the largest gradients win, and those are neighbours; plain fine-tuning has them in the first blocks, yet
  spread blocks do better (BSR, arXiv 2405.10951). It is a facility-location function: submodular, diminishing returns.
* ``kept``: mean over the blocks of the share of the class token's attention (measured) that is on tokens still there;
  for other tasks than classification, the share of tokens. It favours late drops, and few.

What it costs. Equal blocks cost the same, except that the backward pass must reach the earliest one. So for every
possible earliest block, S is the set with the best coverage, and the mildest drops that fit are looked for. The evenly
spaced set is always among the candidates.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m3bsr.bsr.forward import block_roles
from m3bsr.bsr.reprogram import ReprogrammedMixin, tokens_left
from m3bsr.bsr.tokens import num_kept
from m3bsr.bsr.trainable import set_trainable
from m3bsr.cost.flops import count_macs
from m3bsr.cost.information import classification_loss, measure_blocks, vit_of
from m3bsr.cost.measure import LossFn, tensors_in
from m3bsr.cost.memory import allocations
from m3bsr.cost.params import storage_bytes
from m3bsr.cost.predict import BackboneShape, Parts, backbone_parts, backbone_shape, peak_above_lasting
from m3bsr.cost.saved import SavedBytes
from m3bsr.cost.stages import FLOAT, Stage
from m3bsr.plan import MERGED, Plan, Recompute

KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
MAX_DROPS = 3
RECOMPUTE: tuple[Recompute, ...] = ("none", "cheap", "both")
# Sets of blocks that are all tried; beyond that one block after the other is added.
MAX_SETS = 3000
ADAMW_COPIES = 2
# For what has no formula, such as the index tables of the drops.
SLACK = 1.01


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


def suggest_plan(
    model: nn.Module,
    batches: Iterable[Any],
    num_blocks: int = 3,
    memory_bytes: int | None = None,
    compute: float | None = None,
    *,
    loss: LossFn | None = None,
    micro_batch: int = 4,
    warm_steps: int = 20,
    blocks: Sequence[int] | None = None,
    dense: bool | None = None,
) -> Suggestion:
    """Choose the blocks to train and the drops (see the head of this file); the model is not changed in any way.

    The head is fitted before gradients are taken: a classifier's last layer by ridge logistic regression on the
    features of the batches; with a custom ``loss`` by ``warm_steps`` AdamW steps of what head-only training trains.
    All of that happens on a copy, without dropout or augmentation (evaluation mode); the random state is restored.

    Args:
        model: a timm ``VisionTransformer``, reprogrammed or not, or a model with one as ``.backbone``.
        batches: a few batches of the new data, ``(images [B, 3, H, W], labels [B])``, or whatever ``loss`` takes, on
            the model's device; the first gives the batch size of the budgets. 64 samples and more are worthwhile.
        num_blocks: blocks to train.
        memory_bytes: at most this peak of a training step at that batch size, in fp32 with AdamW: parameters,
            gradients, optimizer state, inputs, activations. Recomputation is turned on where needed.
        compute: at most this share of the multiply-accumulates of a full fine-tuning step, such as 0.33.
            With neither budget: as much as the published plan takes (evenly spaced blocks, three drops at .5).
        loss: ``loss(model, batch) -> scalar``; by default cross-entropy.
        micro_batch: samples a gradient (default loss only); fewer is closer to the Fisher trace, and slower.
        blocks: choose among these only (default: all).
        dense: the task needs the whole grid, so dropped tokens come back before the last trained block; by default
            where ``loss`` is given.

    Returns:
        ``(plan, table)``.

    Raises:
        ValueError: an impossible budget (with the smallest that is possible), no batches, a wrong number of blocks, a
            model or block that this library does not know.
    """
    vit = vit_of(model)
    depth = len(vit.blocks)
    allowed = tuple(range(depth)) if blocks is None else tuple(sorted(set(blocks)))
    if any(not 0 <= b < depth for b in allowed):
        raise ValueError(f"blocks {allowed} out of range: the model has blocks 0 to {depth - 1}")
    if not 1 <= num_blocks <= len(allowed):
        raise ValueError(f"num_blocks must lie in 1 to {len(allowed)}, got {num_blocks}")
    for name, budget in (("memory_bytes", memory_bytes), ("compute", compute)):
        if budget is not None and not budget > 0:
            raise ValueError(f"{name} must be positive, got {budget}")
    device = next(model.parameters()).device
    dense = loss is not None if dense is None else dense
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        samples = list(batches)
        if not samples:
            raise ValueError("suggest_plan needs at least one batch")
        if loss is None and not isinstance(model, VisionTransformer):
            raise ValueError(f"for a {type(model).__name__} give loss=loss(model, batch): labels are not class numbers")
        information, mass = measure_blocks(model, samples, loss, micro_batch, warm_steps)
        costs = _Costs(model, samples[0], loss or classification_loss, dense)
    return search_plans(information, mass, costs, num_blocks, allowed, memory_bytes, compute, dense)


class _Costs:
    """Predicted costs of plans: formulas for the blocks, what lies behind them measured once on a copy."""

    def __init__(self, model: nn.Module, batch: Any, loss: LossFn, dense: bool) -> None:
        twin = copy.deepcopy(model).train()
        vit = vit_of(twin)
        if isinstance(vit, ReprogrammedMixin):
            vit.set_plan(Plan(train_blocks=()))
        set_trainable(vit, Plan(train_blocks=()))
        seen: list[torch.Size] = []
        hook = vit.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))

        def step() -> None:
            loss(twin, batch).backward()

        step()
        hook.remove()
        twin.zero_grad(set_to_none=True)
        self.batch_size = seen[0][0]
        self.shape: BackboneShape = backbone_shape(vit, (seen[0][-2], seen[0][-1]))
        with SavedBytes(twin, tensors_in(batch)) as saved:
            loss(twin, batch)
        self._behind = count_macs(step, twin).total
        twin.zero_grad(set_to_none=True)
        own = _peak_behind(step, vit, next(twin.parameters()).device)
        self._dense = dense
        self._behind -= sum(part.forward_macs for _, part in self._parts(Plan(train_blocks=())))
        trained = [p for p in twin.parameters() if p.requires_grad]
        gradient, inputs = sum(p.nbytes for p in trained), tensors_in(batch)
        self._head = Stage(saved.bytes, own, own, gradient)
        self._lasting = storage_bytes([*twin.parameters(), *twin.buffers(), *inputs])
        self._largest = max((p.nbytes for p in vit.parameters()), default=0)
        self._embedded = FLOAT * self.batch_size * (self.shape.num_prefix + self.shape.num_patches) * vit.embed_dim
        self.full_macs = self._behind + _macs(self._parts(Plan()))

    def _parts(self, plan: Plan) -> Parts:
        return backbone_parts(self.shape, plan, self.batch_size, restored=self._dense)

    def __call__(self, plan: Plan) -> tuple[float, int]:
        """Share of a full step's MACs, and the predicted peak in bytes."""
        head, shape = self._head, self.shape
        if not self._dense:  # behind the blocks there are as many tokens as drops left
            left = tokens_left(plan, shape.num_patches, shape.num_prefix, shape.depth)
            share = left / (shape.num_patches + shape.num_prefix)
            stored, forward, backward = (round(share * part) for part in head[:3])
            head = Stage(stored, forward, backward, head.gradient)
        parts = [*self._parts(plan), ("behind", head)]
        gradient = sum(part.gradient for _, part in parts)
        peak = max(peak_above_lasting(parts, self._embedded)[0], gradient + 3 * self._largest)
        peak_bytes = round(SLACK * (self._lasting + ADAMW_COPIES * gradient + peak))
        return (self._behind + _macs(parts)) / self.full_macs, peak_bytes

    def stored(self, plan: Plan) -> int:
        return sum(part.stored for _, part in self._parts(plan))


def _macs(parts: Parts) -> int:
    return sum(part.forward_macs + part.backward_macs for _, part in parts)


# No tensor of a model has so many bytes: an allocation of this size marks a place in the list of allocations.
_MARK = 1_000_003


def _peak_behind(step: Callable[[], None], vit: VisionTransformer, device: torch.device) -> int:
    """Highest point of a head-only step from the MLP of the last block on, in bytes above its start."""
    last: Any = vit.blocks[-1]
    if device.type == "cuda":
        start = torch.cuda.memory_allocated(device)
        hook = last.mlp.register_forward_hook(lambda *_: torch.cuda.reset_peak_memory_stats(device))
        step()
        hook.remove()
        return torch.cuda.max_memory_allocated(device) - start
    hook = last.mlp.register_forward_hook(lambda *_: torch.empty(_MARK, dtype=torch.uint8).numel() and None)
    steps = allocations(step)
    hook.remove()
    sums = list(itertools.accumulate(steps))
    return max(sums[steps.index(_MARK) + 1 :])


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
            tried.append(row(option, ""))
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
