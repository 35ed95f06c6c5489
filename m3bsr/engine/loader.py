"""Batches that can be continued anywhere: one number, the micro-batches done so far, says it all.

The order of an epoch depends on (seed, epoch) alone, and the random numbers of a sample's augmentation on (seed,
epoch, place in the epoch), or with a fixed number of views on (seed, sample, view), the views taking turns. So a run
that goes on from a checkpoint, or with another number of workers, sees the same pixels in the same order.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from m3bsr.engine import distributed
from m3bsr.engine.prefix_cache import PrefixFiles
from m3bsr.engine.rng import derive_seed, isolated_rng

EpochBatches = Callable[[int, torch.Generator], list[list[int]]]
BatchTransform = Callable[[dict[str, Any]], dict[str, Any]]


def steps_in_epoch(samples: int | Sized, batch_size: int, accumulate: int = 1, num_processes: int | None = None) -> int:
    """Optimizer steps in an epoch; the samples that do not fill a last step are left to other epochs.

    Args:
        samples: their number, or the data set (which may have an idea of its own: ``num_batches(batch_size)``).
        batch_size: images per micro-batch of each process.
        num_processes: those of this run by default.

    Raises:
        ValueError: fewer samples than one step needs.
    """
    num_samples = samples if isinstance(samples, int) else len(samples)
    own: Callable[[int], int] = getattr(samples, "num_batches", lambda size: num_samples // size)
    num_processes = distributed.num_processes() if num_processes is None else num_processes
    steps = own(batch_size * num_processes) // accumulate
    if steps == 0:
        factors = f"train.batch_size {batch_size} x train.accumulate {accumulate}"
        factors += f" x {num_processes} processes" if num_processes > 1 else ""
        raise ValueError(
            f"the training set has {num_samples} images, fewer than the {batch_size * accumulate * num_processes} of "
            f"one step ({factors}): lower train.batch_size"
        )
    return steps


def steps_in_run(
    samples: int | Sized, *, epochs: int, batch_size: int, accumulate: int = 1, max_steps: int | None = None
) -> int:
    """Optimizer steps of a whole run: ``epochs`` epochs, at most ``max_steps``."""
    steps = epochs * steps_in_epoch(samples, batch_size, accumulate)
    return steps if max_steps is None else min(steps, max_steps)


class ShuffledBatches(Sampler[list[tuple[int, int]]]):
    """Lists of (index, seed), from micro-batch number ``start`` to ``stop`` of an endless sequence of epochs.

    ``epoch_batches(batch_size, generator)`` gives the lists of indices of an epoch; by default a permutation. Of
    several processes each takes its ``batch_size`` out of a micro-batch that they share, so that together they see
    what one process with all of it would see, with the same random numbers.
    ``num_views``: every sample has so many seeds, which take turns from epoch to epoch; None: always a new one.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        batches_per_epoch: int,
        seed: int,
        start: int,
        stop: int,
        epoch_batches: EpochBatches | None = None,
        num_views: int | None = None,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.num_samples, self.batches_per_epoch = num_samples, batches_per_epoch
        self.shared_size, self.own = batch_size * num_processes, range(rank * batch_size, (rank + 1) * batch_size)
        self.seed, self.start, self.stop = seed, start, stop
        self.epoch_batches = epoch_batches or self._permuted
        self.num_views = num_views

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch: int = -1
        batches: list[list[int]] = []
        for number in range(self.start, self.stop):
            if number // self.batches_per_epoch != epoch:
                epoch = number // self.batches_per_epoch
                generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
                batches = self.epoch_batches(self.shared_size, generator)
            place = number % self.batches_per_epoch
            first = place * self.shared_size
            numbered = [(i, batches[place][i]) for i in self.own]
            yield [(index, self._sample_seed(epoch, first + i, index)) for i, index in numbered]

    def _sample_seed(self, epoch: int, place: int, index: int) -> int:
        if self.num_views is None:
            return derive_seed(self.seed, epoch, place)
        return derive_seed(self.seed, index, (epoch + index) % self.num_views)

    def _permuted(self, batch_size: int, generator: torch.Generator) -> list[list[int]]:
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        return [order[i : i + batch_size] for i in range(0, self.batches_per_epoch * batch_size, batch_size)]


class EvalBatches(Sampler[list[int]]):
    """Of several processes each takes every so many-th of ``batches``, and all of them equally many.

    Where they do not come out even, the last is one that another process has too: it keeps step, and only the first
    :attr:`num_own` are to be scored.
    """

    def __init__(self, batches: Sequence[Sequence[int]], rank: int = 0, num_processes: int = 1) -> None:
        own = [list(batch) for batch in batches[rank::num_processes]]
        self.num_own = len(own)
        rounds = -(-len(batches) // num_processes)
        self.batches = own + [list(batch) for batch in batches[: rounds - len(own)]]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class SeededBatches(Dataset[Any]):
    """Batches of ``dataset`` by lists of (index, seed): the same whoever fetches them, in whatever order.

    ``batch_transform`` changes whole batches (mixup); its random numbers hang on the seed of the first sample.
    ``prefixes``: what is kept of their first blocks goes into the batch as well.
    """

    def __init__(
        self, dataset: Any, batch_transform: BatchTransform | None = None, prefixes: PrefixFiles | None = None
    ) -> None:
        self.dataset, self.batch_transform, self.prefixes = dataset, batch_transform, prefixes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> dict[str, Any]:
        samples = []
        for index, seed in keys:
            with isolated_rng(seed):
                samples.append(self.dataset[index])
        batch = collate(samples)
        if self.prefixes is not None:
            batch["seed"] = [seed for _, seed in keys]
            batch["prefix"] = self.prefixes.read_batch(batch["index"], batch["seed"])
        if self.batch_transform is not None:
            with isolated_rng(derive_seed(keys[0][1], len(keys))):
                batch = self.batch_transform(batch)
        return batch


def train_loader(
    dataset: Any,
    *,
    batch_size: int,
    accumulate: int = 1,
    start_step: int,
    stop_step: int,
    seed: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    batch_transform: BatchTransform | None = None,
    num_views: int | None = None,
    prefixes: PrefixFiles | None = None,
) -> DataLoader[Any]:
    """One loader for all that is left of a run; workers live, and fetch ahead, across the ends of epochs."""
    batches = ShuffledBatches(
        len(dataset),
        batch_size,
        batches_per_epoch=steps_in_epoch(dataset, batch_size, accumulate) * accumulate,
        epoch_batches=getattr(dataset, "epoch_batches", None),
        seed=seed,
        start=start_step * accumulate,
        stop=stop_step * accumulate,
        num_views=num_views,
        **distributed.place(),
    )
    seeded = SeededBatches(dataset, batch_transform, prefixes)
    return _loader(seeded, num_workers, pin_memory, batch_sampler=batches, collate_fn=_as_it_is)


def eval_loader(dataset: Any, *, batch_size: int, num_workers: int = 0, pin_memory: bool = False) -> DataLoader[Any]:
    """Every sample once, in order, shared out among the processes (see :class:`EvalBatches`).

    A data set with ``eval_batches(batch_size)`` says which samples go together.
    """
    size = len(dataset)
    in_order = [range(first, min(first + batch_size, size)) for first in range(0, size, batch_size)]
    batches = dataset.eval_batches(batch_size) if hasattr(dataset, "eval_batches") else in_order
    sampler = EvalBatches(batches, **distributed.place())
    persistent = num_workers > 0
    return _loader(
        dataset, num_workers, pin_memory, persistent_workers=persistent, collate_fn=collate, batch_sampler=sampler
    )


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples as a batch: tensors of one shape are stacked, everything else becomes a list.

    Labels at original resolution may differ in size from image to image.
    """
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        same = all(isinstance(value, Tensor) and value.shape == values[0].shape for value in values)
        # Not torch.stack: in a worker this one writes right into the memory that is shared with the training process.
        batch[key] = default_collate(values) if same else values
    return batch


def _loader(dataset: Any, num_workers: int, pin_memory: bool, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=partial(_init_worker, os.getpid()),
        # Without a generator of its own a loader draws its base seed from the global one, each time it starts.
        generator=torch.Generator().manual_seed(0),
        **kwargs,
    )


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _init_worker(parent: int, _: int) -> None:
    """Go if ``parent`` was killed while this worker started: PyTorch's watchdog, which begins only after this, would
    take whoever inherits the worker for its parent, and wait for ever.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group, yet the main process has a step to finish.

    SIGINT is ignored. So is the first SIGTERM; a second one comes from the main process that wants its worker gone.
    """
    if os.getppid() != parent:
        os._exit(0)
    terms = 0

    def on_term(*_: Any) -> None:
        nonlocal terms
        terms += 1
        if terms > 1:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_term)
