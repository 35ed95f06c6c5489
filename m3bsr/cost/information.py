"""How much training each block of a ViT would bring, measured by gradients on a few batches (see ``suggest``)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from m3bsr.bsr.attention import attend
from m3bsr.bsr.reprogram import ReprogrammedMixin, reprogram
from m3bsr.bsr.trainable import set_trainable
from m3bsr.cost.measure import LossFn
from m3bsr.plan import Plan

# The head before gradients are measured: ridge penalty of the logistic regression, AdamW's rate.
HEAD_PENALTY, HEAD_LR = 1e-2, 1e-3


def vit_of(model: nn.Module) -> VisionTransformer:
    vit = model if isinstance(model, VisionTransformer) else getattr(model, "backbone", None)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(
            f"suggest_plan needs a timm VisionTransformer or a model around one, got {type(model).__name__}"
        )
    return vit


def classification_loss(model: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def measure_blocks(
    model: nn.Module, batches: Sequence[Any], loss: LossFn | None, micro_batch: int, warm_steps: int
) -> tuple[list[float], list[list[float]] | None]:
    """Information of every block, and for classification the attention curve of every block."""
    twin = copy.deepcopy(model).eval()
    vit = vit_of(twin)
    if isinstance(vit, ReprogrammedMixin):
        vit.set_plan(Plan())
    mass = None
    if loss is None:
        mass = _attention_curves(vit, batches)
        _fit_classifier(vit, batches)
        samples = [part for batch in batches for part in _split(batch, micro_batch)]
    else:
        _train_heads(twin, vit, batches, loss, warm_steps)
        samples = list(batches)
    twin.requires_grad_(False)
    vit.blocks.requires_grad_(True)
    squares = torch.zeros(len(vit.blocks), dtype=torch.float64)
    for sample in samples:
        (loss or classification_loss)(twin, sample).backward()
        for i, block in enumerate(vit.blocks):
            grads = [p.grad for p in block.parameters() if p.grad is not None]
            squares[i] += sum(float(g.double().square().sum()) for g in grads)
        twin.zero_grad(set_to_none=True)
    information = (squares / len(samples)).sqrt()
    if not torch.isfinite(information).all() or information.sum() == 0:
        raise ValueError("gradients of the blocks are all zero or not finite: check images, labels and loss")
    return (information / information.sum()).tolist(), mass


def _split(batch: Any, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = batch
    return zip(images.split(size), labels.split(size), strict=True)


@torch.no_grad()
def _attention_curves(vit: VisionTransformer, batches: Sequence[Any]) -> list[list[float]] | None:
    """Per block M numbers: the share of the scores on the k + 1 best tokens, mean over the images."""
    if not all(isinstance(getattr(block, "attn", None), Attention) for block in vit.blocks):
        return None
    model = reprogram(vit, Plan(train_blocks=()))
    kind = "class_row" if vit.has_class_token else "received"
    curves: list[list[Tensor]] = [[] for _ in vit.blocks]
    for images, _ in batches:
        x_BND, _grid = model.embed(images)
        for curve, block in zip(curves, vit.blocks, strict=True):
            b: Any = block
            scored = attend(b.attn, b.norm1(x_BND), score=kind, num_prefix=vit.num_prefix_tokens, want_keys=False)  # type: ignore[arg-type]
            assert scored.scores_BM is not None
            ordered = scored.scores_BM.sort(dim=1, descending=True).values
            curve.append((ordered.cumsum(1) / ordered.sum(1, keepdim=True)).cpu())
            x_BND = b(x_BND)
    return [torch.cat(curve).mean(0).tolist() for curve in curves]


def _fit_classifier(vit: VisionTransformer, batches: Sequence[Any]) -> None:
    """Logistic regression with a ridge penalty on the features that the last layer sees."""
    linear = vit.head
    if not isinstance(linear, nn.Linear):
        raise ValueError("the model has no classifier (num_classes=0): give num_classes, or a loss")
    inputs: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        for images, _ in batches:
            vit(images)
    hook.remove()
    features, labels = torch.cat(inputs).float(), torch.cat([labels for _, labels in batches])
    scale = features.std() + 1e-6
    weight = torch.zeros(linear.out_features, linear.in_features, device=features.device, requires_grad=True)
    bias = torch.zeros(linear.out_features, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features / scale, weight, bias), labels)
        value = value + HEAD_PENALTY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        linear.weight.copy_(weight / scale)
        if linear.bias is not None:
            linear.bias.copy_(bias)


def _train_heads(twin: nn.Module, vit: VisionTransformer, batches: Sequence[Any], loss: LossFn, steps: int) -> None:
    set_trainable(vit, Plan(train_blocks=()))
    trained = [p for p in twin.parameters() if p.requires_grad]
    if not trained or steps < 1:
        return
    optimizer = torch.optim.AdamW(trained, lr=HEAD_LR)
    for _, batch in zip(range(steps), itertools.cycle(batches), strict=False):
        optimizer.zero_grad(set_to_none=True)
        loss(twin, batch).backward()
        optimizer.step()
