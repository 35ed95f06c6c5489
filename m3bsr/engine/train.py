"""The training loop: one function, read from top to bottom."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from tqdm import tqdm

from m3bsr.engine import distributed
from m3bsr.engine.balance import BALANCES
from m3bsr.engine.conflict import make_gradients
from m3bsr.engine.damaged import KEY, DamagedSamples
from m3bsr.engine.ema import Ema
from m3bsr.engine.evaluate import Metrics, evaluate, labelled, score
from m3bsr.engine.expert_shares import ExpertShares
from m3bsr.engine.finite import NonFiniteError, check_finite
from m3bsr.engine.loader import BatchTransform, eval_loader, steps_in_epoch, steps_in_run, train_loader
from m3bsr.engine.log import RunLog, Window
from m3bsr.engine.losses import loss_size, task_losses
from m3bsr.engine.precision import autocast, is_slow
from m3bsr.engine.prefix_cache import PrefixCache
from m3bsr.engine.progress import Progress, Saver, say
from m3bsr.engine.rng import derive_seed, seed_everything
from m3bsr.engine.shards import is_sharded, whole
from m3bsr.engine.stop import StopSignal
from m3bsr.tasks.base import Task
from m3bsr.utils.lookup import lookup

__all__ = ["NonFiniteError", "TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` did."""

    progress: Progress
    stopped_by: int | None
    """Signal number, if a signal ended the run early."""
    checkpoint: Path
    step_ms: list[float]
    """Time of each step taken now, without waiting for data."""
    data_wait: float
    """Share of the time of all these steps that was spent waiting for data."""
    num_processes: int = 1


def train(
    model: nn.Module,
    tasks: Mapping[str, Task],
    train_set: Any,
    val_set: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    run_dir: str | Path,
    config_dict: Mapping[str, Any],
    epochs: int,
    max_steps: int | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    precision: str = "fp32",
    clip_norm: float | None = 1.0,
    ema_decay: float = 0.0,
    loss_weights: Mapping[str, float] | None = None,
    loss_balance: str = "fixed",
    loss_conflict: str = "none",
    loss_stride: int = 1,
    balance_weight: float = 0.0,
    z_weight: float = 0.0,
    eval_every: int = 1,
    eval_batch_size: int = 8,
    save_every: int | None = None,
    log_every: int = 10,
    num_workers: int = 0,
    max_skipped: float = 0.01,
    seed: int = 0,
    device: torch.device | str = "cpu",
    resume: bool = False,
    batch_transform: BatchTransform | None = None,
    num_views: int | None = None,
    prefix_cache: PrefixCache | None = None,
    expert_parallel: int = 1,
    reporter: Callable[[nn.Module, Metrics], Mapping[str, np.ndarray]] | None = None,
    tensorboard: bool = True,
    progress_bar: bool = True,
) -> TrainResult:
    """Train ``model``; evaluate, log and save on the way.

    The loss is ``sum_t weight_t * loss_t + balance_weight * balance_loss + z_weight * z_loss``, its gradient the mean
    over ``accumulate`` micro-batches of ``batch_size`` images. SIGINT and SIGTERM let the step finish, save ``last``
    and return; a second SIGINT raises KeyboardInterrupt. Checkpoints: ``last`` at each evaluation, at the end and
    every ``save_every`` steps, the one before it as ``previous``, and ``best`` (see ``evaluate.score``).

    With several processes (``engine.distributed``) a step has ``batch_size * accumulate`` images of each, gradients
    and losses are means over them as well, and a signal to any of them ends all after the same step. With
    ``expert_parallel`` each of so many neighbours holds a share of the experts only, until the end.

    Args:
        model: ``model(images, tasks=(...), size=(h, w)) -> output`` with ``predictions[task]``, ``balance_loss`` and
            ``z_loss``; ``set_step(step)`` is called before each step if there is one.
        scheduler: timm scheduler, told the number of finished steps by ``step_update``.
        max_steps: an end before ``epochs`` are over.
        loss_weights: per task, the task's default where it has none.
        loss_balance: rule of ``engine.balance.BALANCES`` that changes these weights on the way.
        loss_conflict: rule of ``engine.conflict.CONFLICTS`` that makes one gradient of those of the tasks.
        loss_stride: training losses at ``1 / loss_stride`` of the image size: full-size logits can dominate memory.
        ema_decay: of the moving average of the weights (``engine.ema``) that is evaluated, saved, and left in
            ``model`` when the run gets to its end; 0 for none.
        eval_every: epochs between evaluations; 0 evaluates at the end only.
        max_skipped: share of either set whose samples may be damaged, if the sets replace them (``engine.damaged``).
        resume: go on from the newest whole checkpoint of ``run_dir``, to the same bits as without the interruption.
        batch_transform: of a whole training batch (mixup), in the loader's processes.
        num_views: so many augmented views of each sample, the same in all epochs; None: always new ones.
        prefix_cache: keeps what the frozen first blocks give for each view (``model`` takes it as ``prefix=``).
        expert_parallel: number of processes that share the experts out; it divides the number of processes.
        reporter: called with the model and its metrics after each evaluation for pictures
            ``{tag: uint8 [H, W, 3]}`` that go to TensorBoard.

    Raises:
        ValueError: too few images for a step, a precision that the device lacks, a checkpoint of another model, a
            damaged sample, experts that cannot be shared out.
        NonFiniteError: a loss or gradient is NaN or infinite (with fp16 the loss scaler deals with gradients, as long
            as a smaller scale can help).
    """
    # set-up, or everything as it was when the checkpoint was saved
    device = torch.device(device)
    autocast(device, precision)  # complains now, not after the first batch
    _check_together(
        {
            "train.parallel fsdp": is_sharded(model),
            "moe.expert_parallel": expert_parallel > 1,
            "train.precision fp16": precision == "fp16",
            "train.ema_decay": ema_decay > 0,
            "bsr.cache_prefix": prefix_cache is not None,
            "loss.conflict": loss_conflict != "none",
        }
    )
    if is_slow(device, precision):
        say("warning: this CPU has no bf16 arithmetic: train.precision fp32 will be several times faster")
    model.to(device)
    set_step = getattr(model, "set_step", lambda step: None)
    distributed.same_as_main([*model.buffers(), *(p for p in model.parameters() if not is_sharded(model))])
    shares = ExpertShares(model, optimizer, expert_parallel)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: (loss_weights or {}).get(name, task.default_weight) for name, task in tasks.items()}
    epoch_steps = steps_in_epoch(train_set, batch_size, accumulate)
    total_steps = steps_in_run(
        train_set, epochs=epochs, batch_size=batch_size, accumulate=accumulate, max_steps=max_steps
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if (rank := distributed.place()["rank"]) > 0:
        seed_everything(derive_seed(seed, rank))  # dropout and gate noise of its own
    ema = Ema(model, ema_decay) if ema_decay else None
    stateful = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "ema": ema}
    saver = Saver(Path(run_dir) / "checkpoints", config_dict, shares=shares, **stateful)
    at = saver.resume(total_steps) if resume else Progress(total_steps)
    balance = lookup(BALANCES, loss_balance, "loss.balance")(weights, epoch_steps, at.loss_balance)
    aux_weights = {"balance_loss": balance_weight, "z_loss": z_weight, "auxiliary_loss": 1.0}
    gradients = make_gradients(loss_conflict, trained, tasks, scaler, accumulate, aux_weights)
    log = RunLog(run_dir, start_step=at.step, tensorboard=tensorboard)
    damaged = DamagedSamples({"train": len(train_set), "val": len(val_set)}, max_skipped, at.damaged)
    window, step_ms, waited_ms = Window(at.window), [], 0.0

    # data: both loaders live as long as the run
    images_per_step = batch_size * accumulate * distributed.num_processes()
    loading: dict[str, Any] = {"num_workers": num_workers, "pin_memory": device.type == "cuda"}
    steps: dict[str, Any] = {"start_step": at.step, "stop_step": total_steps, "accumulate": accumulate}
    steps |= {"batch_size": batch_size, "seed": seed, "batch_transform": batch_transform, "num_views": num_views}
    if prefix_cache is not None:
        with distributed.together():
            steps["prefixes"] = prefix_cache.open(model, device, precision)  # type: ignore[arg-type]
    batches = iter(train_loader(train_set, **steps, **loading))
    val_batches = eval_loader(val_set, batch_size=eval_batch_size, **loading)

    def evaluation_is_due() -> bool:
        now = at.step == total_steps or (eval_every > 0 and at.step % (eval_every * epoch_steps) == 0)
        return now and at.evaluated_step < at.step

    def note_damaged(split: str, step: int, found: Mapping[str, Any]) -> None:
        lines = distributed.gather(list(found[KEY])) if KEY in found else []
        for line in damaged.note(split, {KEY: itertools.chain(*lines)}):
            say(f"warning: step {step}: damaged {split} sample: {line}")
            log.write({"kind": "damaged", "step": step, "split": split, "error": line})
        at.damaged = damaged.lines

    progress_bar = progress_bar and distributed.is_main()
    bar = tqdm(total=total_steps, initial=at.step, unit="step", desc="train", disable=not progress_bar)
    with StopSignal() as stop, bar:
        model.train()
        while not stop.agreed():
            # evaluate: first thing in the loop, so that a run that was stopped before it catches up
            if evaluation_is_due():
                try:
                    unless_stopped = _UnlessStopped(stop, val_batches)
                    with saver.averaged():
                        distributed.same_buffers(model)
                        metrics = evaluate(model, tasks, unless_stopped, device, precision, progress=progress_bar)
                        pictures = reporter(model, metrics) if reporter and not is_sharded(model) else {}
                except _StoppedError:
                    break
                note_damaged("val", at.step, {KEY: metrics.damaged})
                is_best = at.note_evaluation(metrics, score(metrics, tasks))
                log.write(_val_record(at, epoch_steps, metrics.routing))
                log.pictures(at.step, pictures)
                if is_best:
                    saver.save("best", at)
                saver.save("last", at, must=at.step == total_steps)
            if at.step >= total_steps:
                break

            # gradients, one micro-batch after the other
            began, wait = time.perf_counter(), 0.0
            files: list[str] = []
            seen: dict[str, list[Tensor]] = {}
            set_step(at.step)
            for _ in range(accumulate):
                # data
                asked = time.perf_counter()
                batch = next(batches)
                wait += time.perf_counter() - asked
                note_damaged("train", at.step + 1, batch)
                files += batch["name"]
                images = batch["image"].to(device, non_blocking=True)
                targets = {name: batch[name].to(device, non_blocking=True) for name in labelled(batch, tasks)}
                # forward
                distributed.meet()  # experts and weights that are spread out are waited for in here
                with autocast(device, precision):
                    kept = {} if prefix_cache is None else {"prefix": prefix_cache.prefix(images, batch)}
                    output = model(images, tasks=tuple(targets), size=loss_size(images, loss_stride), **kept)
                window.add_routing(output)
                # losses, in float32 whatever the precision
                parts = task_losses(output, targets, tasks, balance.weights(), balance_weight, z_weight)
                # backward
                gradients.add(parts, balance.weights())
                for name, part in parts.items():
                    seen.setdefault(name, []).append(part.detach())
                del output, parts  # what is left of the graph must not live beside the next one
            gradients.finish()

            # means over the processes
            shares.mean_gradients(trained)
            # step, unless a number is bad; reading the numbers is the only wait for the device
            scaler.unscale_(optimizer)
            grad_norm = shares.total_norm(trained)
            # with several data sets a task is in some of the micro-batches only
            means = [torch.stack(parts_of).mean() for parts_of in seen.values()]
            numbers = distributed.mean(torch.stack([*means, whole(grad_norm).float()])).tolist()
            values = dict(zip((*seen, "grad_norm"), numbers, strict=True))
            # an fp16 overflow is for the scaler, which skips the step; below a scale of 1 it is something else
            strict = precision != "fp16" or scaler.get_scale() < 1
            check_finite(values, trained, step=at.step, files=files, last_good=saver.last_good, gradients=strict)
            if clip_norm:
                clip_grads_with_norm_(trained.values(), clip_norm, grad_norm)
            lr, scale = max(group["lr"] for group in optimizer.param_groups), scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update()
            at.num_overflows += scaler.get_scale() < scale
            at.step += 1
            scheduler.step_update(at.step)
            balance.note({name: values[f"losses/{name}"] for name in tasks if f"losses/{name}" in values}, at.step)
            at.loss_balance = balance.state

            # log
            step_ms.append(1000 * (time.perf_counter() - began - wait))
            waited_ms += 1000 * wait
            window.add(**values, step_ms=step_ms[-1], wait_ms=1000 * wait)
            bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
            bar.update()
            if at.step % log_every == 0 or at.step == total_steps:
                record = _train_record(at, epoch_steps, window.pop_means(), lr, images_per_step)
                log.write(record | ({"loss_weights": balance.weights()} if balance.state else {}))

            # save; when an evaluation comes next, it saves
            at.window = window.sums
            if save_every and at.step % save_every == 0 and not evaluation_is_due():
                saver.save("last", at)

        if stop.signum is not None:
            saver.save("last", at, must=True)
        elif ema is not None:
            ema.keep()
    shares.gather()
    distributed.wait_for_all()  # before the last checkpoint is whole, no process ends, which would end the others
    log.close()
    data_wait = waited_ms / (waited_ms + sum(step_ms)) if step_ms else 0.0
    return TrainResult(at, stop.signum, saver.folder / "last", step_ms, data_wait, distributed.num_processes())


_NOT_TOGETHER = {
    "train.parallel fsdp": ("train.precision fp16", "train.ema_decay", "bsr.cache_prefix", "loss.conflict"),
    "moe.expert_parallel": (
        "train.parallel fsdp",
        "train.precision fp16",
        "train.ema_decay",
        "bsr.cache_prefix",
        "loss.conflict",
    ),
}


def _check_together(used: Mapping[str, bool]) -> None:
    for field, others in _NOT_TOGETHER.items():
        if used[field] and (found := [other for other in others if used[other]]):
            raise ValueError(f"{', '.join(found)}: not with {field}; leave one of them out")


class _StoppedError(Exception):
    """A signal came during an evaluation, whose half is of no use."""


class _UnlessStopped:
    """The batches of a loader, unless a signal comes."""

    def __init__(self, stop: StopSignal, loader: Any) -> None:
        self.stop, self.loader = stop, loader

    @property
    def batch_sampler(self) -> Any:
        return self.loader.batch_sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if self.stop.agreed():
                raise _StoppedError
            yield batch


def _train_record(
    at: Progress, epoch_steps: int, means: dict[str, Any], lr: float, images_per_step: int
) -> dict[str, Any]:
    step_ms, wait_ms = means.pop("step_ms"), means.pop("wait_ms")
    losses = {name.removeprefix("losses/"): means.pop(name) for name in list(means) if name.startswith("losses/")}
    return {
        "kind": "train",
        "step": at.step,
        "epoch": at.step / epoch_steps,
        "losses": losses,
        **({"num_overflows": at.num_overflows} if at.num_overflows else {}),
        **means,
        "lr": lr,
        "samples_per_s": 1000 * images_per_step / (step_ms + wait_ms),
        "step_ms": step_ms,
        "data_wait": wait_ms / (step_ms + wait_ms),
    }


def _val_record(at: Progress, epoch_steps: int, routing: Mapping[str, Any]) -> dict[str, Any]:
    record = {
        "kind": "val",
        "step": at.step,
        "epoch": at.step / epoch_steps,
        "best_step": at.best_step,
        "protocol": at.protocol,
        "metrics": at.metrics,
    }
    return {**record, "routing": routing} if routing else record
