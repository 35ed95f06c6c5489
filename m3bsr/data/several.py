"""Several classification data sets as one: every batch comes from one of them, in an order that is stated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from m3bsr.data.labelled import LabelledImages
from m3bsr.utils.lookup import lookup

Batches = Iterator[list[int]]


class SeveralSets(Dataset):
    """``sets[task]`` side by side: sample ``i`` carries its label under the name of its task.

    An epoch (see :meth:`epoch_batches`) mixes the sets by ``interleave``:

    * ``proportional``: each set's whole batches once, in random order.
    * ``round_robin``: one batch of each set in turn until the largest is through; smaller ones begin again.
    * ``temperature``: as many batches as ``proportional``, each of a random set, drawn with probability
      ``size ** (1 / temperature)``: 1 follows the sizes, larger values favour the small sets.

    Args:
        sets: per task a classification data set.
        interleave: name of the rule.
        temperature: of the rule of that name.

    Raises:
        ValueError: no set, or an unknown rule.
    """

    def __init__(
        self, sets: Mapping[str, LabelledImages], interleave: str = "proportional", temperature: float = 2.0
    ) -> None:
        if not sets:
            raise ValueError("data.sets must name at least one data set")
        self.sets, self.temperature = dict(sets), temperature
        self.rule = lookup(RULES, interleave, "data.interleave")
        ends = list(itertools.accumulate(len(images) for images in self.sets.values()))
        self.ranges = {t: range(end - len(self.sets[t]), end) for t, end in zip(self.sets, ends, strict=True)}

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        return {task: images.class_names["classification"] for task, images in self.sets.items()}

    @property
    def transform(self) -> Any:
        return next(iter(self.sets.values())).transform

    def __len__(self) -> int:
        return sum(map(len, self.sets.values()))

    def __getitem__(self, index: int) -> dict[str, Any]:
        for task, indices in self.ranges.items():
            if index in indices:
                sample = self.sets[task][index - indices.start]
                sample[task] = sample.pop("classification")
                return {**sample, "name": f"{task}/{sample['name']}", "index": index}
        raise IndexError(index)

    def num_batches(self, batch_size: int) -> int:
        """Batches in an epoch.

        Raises:
            ValueError: a set with fewer images than a batch.
        """
        whole = self._whole_batches(batch_size)
        return len(whole) * max(whole.values()) if self.rule is _round_robin else sum(whole.values())

    def epoch_batches(self, batch_size: int, generator: torch.Generator) -> list[list[int]]:
        """The batches of one epoch, each of one set; depends on the generator's state alone."""
        whole = self._whole_batches(batch_size)
        streams = {task: _endless(self.ranges[task], batch_size, generator) for task in self.sets}
        sizes = {task: float(len(images)) ** (1 / self.temperature) for task, images in self.sets.items()}
        return [next(streams[task]) for task in self.rule(whole, sizes, generator)]

    def eval_batches(self, batch_size: int) -> list[list[int]]:
        """Every sample once, in order, no batch across two sets."""
        return [
            list(indices[start : start + batch_size])
            for indices in self.ranges.values()
            for start in range(0, len(indices), batch_size)
        ]

    def _whole_batches(self, batch_size: int) -> dict[str, int]:
        whole = {task: len(images) // batch_size for task, images in self.sets.items()}
        for task, number in whole.items():
            if number == 0:
                raise ValueError(
                    f"{task} has {len(self.sets[task])} training images, fewer than a batch of {batch_size}: "
                    "lower train.batch_size"
                )
        return whole


def _endless(indices: range, batch_size: int, generator: torch.Generator) -> Batches:
    """Whole batches of a set, in a new order each time it is through."""
    while True:
        order = torch.randperm(len(indices), generator=generator)[: len(indices) // batch_size * batch_size]
        yield from ((order[i : i + batch_size] + indices.start).tolist() for i in range(0, len(order), batch_size))


def _proportional(whole: dict[str, int], sizes: dict[str, float], generator: torch.Generator) -> list[str]:
    turns = [task for task, number in whole.items() for _ in range(number)]
    return [turns[i] for i in torch.randperm(len(turns), generator=generator).tolist()]


def _round_robin(whole: dict[str, int], sizes: dict[str, float], generator: torch.Generator) -> list[str]:
    return list(whole) * max(whole.values())


def _temperature(whole: dict[str, int], sizes: dict[str, float], generator: torch.Generator) -> list[str]:
    weights = torch.tensor(list(sizes.values()), dtype=torch.float64)
    drawn = torch.multinomial(weights, sum(whole.values()), replacement=True, generator=generator)
    return [list(whole)[i] for i in drawn.tolist()]


RULES: dict[str, Callable[[dict[str, int], dict[str, float], torch.Generator], list[str]]] = {
    "proportional": _proportional,
    "round_robin": _round_robin,
    "temperature": _temperature,
}
