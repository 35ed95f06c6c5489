"""Damaged samples at run time: replaced, counted, and too many of them are an error all the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from m3bsr.engine.rng import derive_seed

KEY = "damaged"
"""In a sample, what was wrong with the one that it stands for: empty, or a line."""
MAX_TRIES = 10


class ReplaceDamaged(Dataset):
    """``dataset``, but a sample that cannot be read gives another one of it, and a line under :data:`KEY`.

    Which one takes its place depends on its index alone, so a resumed run draws the same. Only what a file can do
    wrong (``ValueError``, ``OSError``) counts as damage. Everything else is asked of ``dataset``.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # not there yet while a loader's worker unpickles it
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        line = ""
        for attempt in range(MAX_TRIES):
            place = derive_seed(index, attempt) % len(self) if attempt else index
            try:
                return {**self.dataset[place], KEY: line}
            except (ValueError, OSError) as error:
                line = line or " ".join(str(error).split())
        raise ValueError(f"{MAX_TRIES} samples in a row are damaged, the first: {line}")


class DamagedSamples:
    """Which samples were found damaged so far: ``lines[split]``, plain data that goes into checkpoints.

    Args:
        sizes: samples of each split.
        max_share: of a split that may be damaged.
        lines: of the checkpoint that the run goes on from.
    """

    def __init__(
        self, sizes: Mapping[str, int], max_share: float, lines: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        self.sizes, self.max_share = dict(sizes), max_share
        self.lines = {split: list((lines or {}).get(split, ())) for split in sizes}

    def note(self, split: str, batch: Mapping[str, Any]) -> list[str]:
        """The lines of a batch that are new.

        Raises:
            ValueError: more than the share is damaged; names the files.
        """
        known = self.lines[split]
        new = [line for line in dict.fromkeys(batch.get(KEY, ())) if line and line not in known]
        known += new
        if new and len(known) > self.max_share * self.sizes[split]:
            raise ValueError(
                f"{len(known)} of {self.sizes[split]} {split} samples are damaged, more than the share "
                f"{self.max_share:g} (data.max_skipped): {'; '.join(known)}"
            )
        return new


def without_replaced(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """A batch without the samples that stand for others: an image scored twice would change a metric.

    None if nothing is left.
    """
    kept = [i for i, line in enumerate(batch.get(KEY, ())) if not line]
    if KEY not in batch or len(kept) == len(batch[KEY]):
        return dict(batch)
    pick = torch.tensor(kept, dtype=torch.long)
    rows = {k: v[pick] if isinstance(v, Tensor) else [v[i] for i in kept] for k, v in batch.items()}
    return rows if kept else None
