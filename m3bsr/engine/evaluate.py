"""Metrics of a model over a data set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

from m3bsr.engine.damaged import KEY, without_replaced
from m3bsr.engine.distributed import gather, num_processes, sum_of_all
from m3bsr.engine.precision import autocast
from m3bsr.engine.predictions import PredictionWriter
from m3bsr.engine.shards import is_sharded
from m3bsr.metrics import reduce_over_processes
from m3bsr.moe.stats import RoutingCounts, routing_stats
from m3bsr.tasks.base import Task
from m3bsr.tasks.scoring import Scorer


class Metrics(dict[str, dict[str, float]]):
    """``metrics[task][name]``, with how they were measured.

    ``protocol`` is ``"network"`` (labels at the size of the network's input) or ``"original"`` (predictions resized
    bilinearly to labels of another size, normally that of the photograph). ``expert_counts`` holds per MoE block and
    task how often each expert was chosen, ``[E]``; it is empty for a model without experts. ``damaged`` holds a line
    for each sample that was left out because it could not be read (``data.on_error="skip"``).
    """

    def __init__(
        self,
        values: Mapping[str, dict[str, float]],
        protocol: str,
        num_images: int,
        expert_counts: Mapping[int, Mapping[str, Tensor]] | None = None,
        damaged: Sequence[str] = (),
    ) -> None:
        super().__init__(values)
        self.protocol = protocol
        self.num_images = num_images
        self.expert_counts = expert_counts or {}
        self.damaged = tuple(damaged)

    @property
    def routing(self) -> dict[str, dict[str, Any]]:
        """Where the tokens went, per MoE block; see ``m3bsr.moe.stats.routing_stats``."""
        return routing_stats(self.expert_counts)


def evaluate(
    model: nn.Module,
    tasks: Mapping[str, Task],
    loader: Iterable[Mapping[str, Any]],
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    progress: bool = True,
    *,
    flip: bool = False,
    writer: PredictionWriter | None = None,
    num_workers: int = 0,
) -> Metrics:
    """Run ``model`` over ``loader`` in evaluation mode and score every task; its training mode is put back.

    Several processes each score their part (see ``engine.loader.eval_loader``) and all get the metrics of the whole,
    equal to those of one process: sums of counts exactly, sums of floats to float64 rounding.

    Args:
        loader: batches ``{"image": [B, 3, H, W], task: [B, C, H', W'] or a list of [C, H', W']}``; of a task that is
            not dense ``[B]``. A batch need not have labels for all tasks. With ``writer`` also ``name``: a list.
        flip: average with the predictions for the mirrored images, mirrored back (``Task.mirrored, average``).
        writer: gets every dense prediction at the size at which it is scored.
        num_workers: processes that score slow metrics (edges); less than two: none but this one.

    Raises:
        ValueError: no batch at all, or none with labels for one of the tasks.
    """
    device = torch.device(device)
    metrics = {name: task.metric() for name, task in tasks.items()}
    protocol, num_images, was_training = "network", 0, model.training
    seen: set[str] = set()
    damaged: list[str] = []
    routing = RoutingCounts()
    model.eval()
    try:
        total = len(loader) if isinstance(loader, Sized) else None
        num_own = getattr(getattr(loader, "batch_sampler", None), "num_own", math.inf)  # see loader.EvalBatches
        bar = tqdm(loader, total=total, desc="evaluate", unit="batch", leave=False, disable=not progress)
        # FSDP2 keeps the buffers that it gathers into, and training may not get those of an inference mode.
        with torch.no_grad() if is_sharded(model) else torch.inference_mode(), Scorer(num_workers) as scorer:
            for number, loaded in enumerate(bar):
                is_own = number < num_own  # else run to keep step with the other processes
                if is_own:
                    damaged += filter(None, loaded.get(KEY, ()))
                batch = without_replaced(loaded)
                if batch is None and num_processes() == 1:
                    continue
                is_own, batch = is_own and batch is not None, batch or loaded
                images = batch["image"].to(device, non_blocking=True)
                names = labelled(batch, tasks)
                with autocast(device, precision):
                    output = model(images, tasks=names)
                    predictions = {name: raw.float() for name, raw in output.predictions.items()}
                    if flip:
                        mirrored = model(images.flip(-1), tasks=names).predictions
                        back = {name: tasks[name].mirrored(mirrored[name].float()) for name in predictions}
                        predictions = {name: tasks[name].average([p, back[name]]) for name, p in predictions.items()}
                if not is_own:
                    continue
                routing.add(output)
                seen.update(predictions)
                for name, raw in predictions.items():
                    for first, prediction, target in _pairs(raw, batch[name]):
                        target = target.to(device, non_blocking=True)
                        if tasks[name].dense:
                            if target.shape[-2:] != images.shape[-2:]:
                                protocol = "original"
                            prediction = resize(prediction, target.shape[-2:])
                        scorer.add(tasks[name], metrics[name], prediction, target)
                        if writer is not None:
                            writer.add(name, tasks[name], prediction, batch["name"][first : first + len(prediction)])
                num_images += len(images)
            scorer.finish()
    finally:
        model.train(was_training)
    shares = gather((seen, protocol, num_images, damaged))
    damaged = [line for share in shares for line in share[3]]
    seen, num_images = set().union(*(share[0] for share in shares)), sum(share[2] for share in shares)
    protocol = "original" if "original" in [share[1] for share in shares] else "network"
    if num_images == 0:
        raise ValueError("nothing to evaluate: the validation set is empty")
    if unseen := [name for name in tasks if name not in seen]:
        raise ValueError(f"nothing to evaluate: the validation set has no labels for {', '.join(unseen)}")
    for metric in metrics.values():
        reduce_over_processes(metric)
    scores = {name: metric.compute() for name, metric in metrics.items()}
    return Metrics(scores, protocol, num_images, RoutingCounts(sum_of_all(routing.counts)).per_task(), damaged)


def labelled(batch: Mapping[str, Any], tasks: Iterable[str]) -> tuple[str, ...]:
    """The tasks that a batch has labels for: with several data sets not all of them.

    Raises:
        ValueError: none.
    """
    found = tuple(name for name in tasks if name in batch)
    if not found:
        raise ValueError(f"a batch has labels for none of the tasks {', '.join(tasks)}; it has {', '.join(batch)}")
    return found


def resize(prediction_BCHW: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Raw outputs at ``size = (h, w)``, bilinear; unchanged when they have that size."""
    if prediction_BCHW.shape[-2:] == tuple(size):
        return prediction_BCHW
    return interpolate(prediction_BCHW, size=tuple(size), mode="bilinear", align_corners=False)


def score(metrics: Mapping[str, Mapping[str, float]], tasks: Mapping[str, Task]) -> float:
    """One number to choose the best checkpoint by: mean over tasks of log(main metric), negated where lower is better.

    A relative gain of 1 % counts the same in every task, whatever its unit, and no baseline is needed. Tasks whose
    metric is undefined (no labels) do not count.
    """
    terms = []
    for name, task in tasks.items():
        value = metrics[name][task.main_metric]
        if math.isfinite(value):
            terms.append(math.log(max(value, 1e-8)) * (1 if task.higher_is_better else -1))
    return sum(terms) / len(terms) if terms else -math.inf


def _pairs(prediction: Tensor, target: Any) -> list[tuple[int, Tensor, Tensor]]:
    """(number of the first image, prediction, target), of one size each; targets of different sizes come as a list."""
    if isinstance(target, Tensor):
        return [(0, prediction, target)]
    return [(i, prediction[i : i + 1], target[i][None]) for i in range(len(target))]
