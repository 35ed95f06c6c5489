"""From a model and photographs to plain arrays: predictions, tokens dropped, experts chosen.

Shapes: B images, P patches, N tokens of a block (prefix tokens first), K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from m3bsr.bsr import DropStage, Plan, keep_rates_of_training, patches_kept
from m3bsr.bsr.tokens import take
from m3bsr.moe.routing import Routing
from m3bsr.report.panels import Sample, shrink
from m3bsr.tasks.base import Task
from m3bsr.utils.constants import NO_CLASS

LONGEST_SIDE = 480
"""Pictures of a report are at most this many pixels high and wide."""


@dataclass(frozen=True)
class Collected:
    """What some photographs showed."""

    samples: tuple[Sample, ...]
    load: Mapping[int, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    """Per MoE block and task: how often each expert was chosen, over all samples and all K choices."""


def collect(
    model: nn.Module,
    tasks: Mapping[str, Task],
    images: Tensor,
    *,
    photos: Sequence[np.ndarray],
    names: Sequence[str],
    targets: Mapping[str, Sequence[Tensor | None]] | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
    size: tuple[int, int] | None = None,
    autocast: AbstractContextManager[Any] | None = None,
    longest: int = LONGEST_SIDE,
) -> Collected:
    """Run `model` once on `images [B, 3, H, W]` in evaluation mode; its training mode is put back.

    Args:
        photos: the images as uint8 `[H', W', 3]`, of any size.
        targets: per task the target of every image: `[C, H', W']`, a class index, or None where it has no label.
        class_names: of the tasks with one answer per image.
        size: of the predictions, by default that of `images`.
        longest: longer side of the pictures, in pixels.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast or nullcontext():
            images = images.to(next(model.parameters()).device)
            output = model(images, tasks=tuple(tasks), size=size)
            every_stage = _stages_of_training(model, images, tuple(tasks), output.stages)
    finally:
        model.train(was_training)
    kept = {t: [m.cpu().numpy() for m in patches_kept(s, output.grid)] for t, s in every_stage.items()}
    experts = {t: _experts(output.routing, output.stages.get(t, ()), t, len(images), output.grid) for t in tasks}
    dense = {name: task for name, task in tasks.items() if task.dense}
    samples = []
    for i in range(len(images)):
        stages = {t: [(s.block, m[i]) for s, m in zip(every_stage[t], kept[t], strict=True)] for t in kept}
        coloured = {t: task.colour(output.predictions[t][i].float(), is_prediction=True) for t, task in dense.items()}
        known = {t: of[i] for t, of in (targets or {}).items() if of[i] is not None}
        truth = {t: task.colour(known[t]) for t, task in dense.items() if t in known}
        answers = {
            t: answer(output.predictions[t][i], known.get(t), (class_names or {}).get(t))
            for t in tasks
            if t not in dense and (t in known or not targets)
        }
        samples.append(
            Sample(
                name=names[i],
                photo=shrink(photos[i], longest),
                predictions={t: shrink(picture, longest) for t, picture in coloured.items()},
                targets={t: shrink(picture, longest) for t, picture in truth.items()},
                answers=answers,
                grid=output.grid,
                kept=stages,
                experts={t: {b: ids[i] for b, ids in blocks.items()} for t, blocks in experts.items() if blocks},
                num_experts=max((r.num_experts for r in output.routing.values()), default=0),
            )
        )
    return Collected(
        tuple(samples), {block: _load(routing, tasks) for block, routing in sorted(output.routing.items())}
    )


def _stages_of_training(
    model: nn.Module, images: Tensor, tasks: tuple[str, ...], seen: Mapping[str, Sequence[DropStage]]
) -> Mapping[str, Sequence[DropStage]]:
    """The drops as training makes them: of a second pass where evaluation keeps more tokens than training."""
    backbone: Any = getattr(model, "backbone", None)
    if backbone is None or getattr(backbone, "plan", Plan()).eval_keep_rate is None:
        return seen
    with keep_rates_of_training(backbone):
        return model(images, tasks=tasks).stages


def collect_from(
    model: nn.Module, tasks: Mapping[str, Task], dataset: Any, num_samples: int = 4, **options: Any
) -> Collected:
    """Like :func:`collect`, for evenly spaced samples of a data set."""
    normalisation = getattr(getattr(dataset, "transform", None), "normalisation", {})
    indices = np.linspace(0, len(dataset) - 1, min(num_samples, len(dataset))).round().astype(int).tolist()
    samples = [dataset[i] for i in indices]
    images = torch.stack([sample["image"] for sample in samples])
    return collect(
        model,
        tasks,
        images,
        photos=[denormalise(image, **normalisation) for image in images],
        names=[sample["name"] for sample in samples],
        targets={task: [sample.get(task) for sample in samples] for task in tasks},
        class_names=getattr(dataset, "class_names", None),
        **options,
    )


def answer(logits_C: Tensor, target: Tensor | None, names: Sequence[str] | None) -> str:
    """The predicted class in words, with the true one where it is another."""

    def name(label: int) -> str:
        return names[label] if names else f"class {label}"

    best = int(logits_C.argmax())
    share = float(logits_C.float().softmax(0)[best])
    wrong = target is not None and int(target) not in (best, NO_CLASS)
    return f"{name(best)} {100 * share:.0f} %" + (f" (is {name(int(target))})" if wrong and target is not None else "")


def denormalise(image: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> np.ndarray:
    """A normalised image `[3, H, W]` as the uint8 photo `[H, W, 3]` that it was; ImageNet's mean and std by default."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    scale = torch.tensor(std or IMAGENET_DEFAULT_STD)[:, None, None]
    shift = torch.tensor(mean or IMAGENET_DEFAULT_MEAN)[:, None, None]
    photo = (image.detach().float().cpu() * scale + shift).clamp(0, 1) * 255
    return photo.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def patch_of_token(
    stages: Sequence[DropStage], block: int, num_tokens: int, num_images: int, grid: tuple[int, int]
) -> Tensor:
    """Patch index `[B, N]` of every token that the MLP of `block` sees; -1 for prefix and fused tokens.

    A drop in `block` itself comes before its MLP. A full count of tokens means that the grid is (again) whole.
    """
    num_patches = grid[0] * grid[1]
    past = [stage for stage in stages if stage.block <= block]
    if not past or num_tokens - past[-1].num_prefix == num_patches:
        prefix = num_tokens - num_patches
        patches = torch.arange(-prefix, num_patches).clamp_min(-1).expand(num_images, -1)
        return patches
    last = past[-1]
    patch_BK = take(last.patch_BM, last.keep_idx_BK).cpu()
    front = patch_BK.new_full((num_images, last.num_prefix), -1)
    fused = patch_BK.new_full((num_images, num_tokens - last.num_prefix - patch_BK.shape[1]), -1)
    return torch.cat([front, patch_BK, fused], dim=1)


def first_choice(routing: Routing, task: str, num_images: int) -> Tensor:
    """First-choice expert `[B, N]` of every token of a task; tasks that are not stacked yet share one stream."""
    row = routing.tasks.index(task) if task in routing.tasks else 0
    experts_GBNK = routing.experts_TK.reshape(len(routing.tasks), num_images, -1, routing.experts_TK.shape[-1])
    weights_GBNK = routing.weights_TK.reshape(experts_GBNK.shape)
    best_BN1 = weights_GBNK[row].argmax(dim=-1, keepdim=True)
    return experts_GBNK[row].gather(-1, best_BN1)[..., 0].cpu()


def _experts(
    routing: Mapping[int, Routing], stages: Sequence[DropStage], task: str, num_images: int, grid: tuple[int, int]
) -> dict[int, np.ndarray]:
    """Per block int `[B, P]`: the first choice of every patch, -1 for those that were dropped."""
    found = {}
    for block, choice in sorted(routing.items()):
        experts_BN = first_choice(choice, task, num_images)
        patch_BN = patch_of_token(stages, block, experts_BN.shape[1], num_images, grid)
        chosen_BP = torch.full((num_images, grid[0] * grid[1] + 1), -1)
        # -1 lands in the extra column.
        chosen_BP.scatter_(1, patch_BN % chosen_BP.shape[1], experts_BN)
        found[block] = chosen_BP[:, :-1].numpy()
    return found


def _load(routing: Routing, tasks: Mapping[str, Task]) -> dict[str, list[int]]:
    counts_GE = routing.counts().cpu()
    return {t: counts_GE[routing.tasks.index(t) if t in routing.tasks else 0].tolist() for t in tasks}
