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
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m3bsr.bsr.reprogram import ReprogrammedMixin, tokens_left
from m3bsr.bsr.trainable import set_trainable
from m3bsr.cost.flops import count_macs
from m3bsr.cost.information import classification_loss, measure_blocks, vit_of
from m3bsr.cost.measure import LossFn, tensors_in
from m3bsr.cost.memory import allocations
from m3bsr.cost.params import storage_bytes
from m3bsr.cost.parts import BackboneShape, Parts, backbone_parts, backbone_shape
from m3bsr.cost.predict import peak_above_lasting
from m3bsr.cost.saved import SavedBytes
from m3bsr.cost.search import Suggestion, search_plans
from m3bsr.cost.stages import Stage
from m3bsr.plan import Plan

ADAMW_COPIES = 2
# For what has no formula, such as the index tables of the drops.
SLACK = 1.01


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
        peak = max(peak_above_lasting(parts)[0], gradient + 3 * self._largest)
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
