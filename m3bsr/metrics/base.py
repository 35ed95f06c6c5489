"""The protocol of every metric: sums that are added to, so streaming, merging and reducing are one operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor


@runtime_checkable
class Metric(Protocol):
    """What the engine needs of a metric."""

    def update(self, prediction: Tensor, target: Tensor) -> None: ...

    def compute(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Tensor]: ...

    def merge(self, state: Mapping[str, Tensor]) -> None: ...

    def reset(self) -> None: ...


class Sums:
    """Named CPU tensors that only ever grow by addition: the whole state of a metric, of constant size.

    Counts are int64 and real sums float64, so a long evaluation does not drift, and the sum over processes equals
    the sum in one process (exactly for counts, to float64 rounding for the rest).
    """

    def __init__(self, **zeros: Tensor) -> None:
        self._sums = {name: zero.clone() for name, zero in zeros.items()}

    def add(self, name: str, value: Tensor) -> None:
        total = self._sums[name]
        total += value.detach().to(device="cpu", dtype=total.dtype)

    def __getitem__(self, name: str) -> Tensor:
        return self._sums[name]

    def state(self) -> dict[str, Tensor]:
        """Copies of all sums."""
        return {name: total.clone() for name, total in self._sums.items()}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add another accumulator's :meth:`state`. ValueError if it belongs to another kind of metric."""
        if set(state) != set(self._sums):
            raise ValueError(f"cannot merge metric states: expected {sorted(self._sums)}, got {sorted(state)}")
        for name, value in state.items():
            if value.shape != self._sums[name].shape:
                raise ValueError(
                    f"cannot merge metric states: {name} has shape {tuple(value.shape)}, "
                    f"expected {tuple(self._sums[name].shape)}"
                )
            self.add(name, value)

    def reset(self) -> None:
        for total in self._sums.values():
            total.zero_()


class SumMetric:
    """A metric whose state is one :class:`Sums`; subclasses write ``update`` and ``compute``."""

    def __init__(self, **zeros: Tensor) -> None:
        self.sums = Sums(**zeros)

    def state(self) -> dict[str, Tensor]:
        """The sums so far (CPU tensors); states of several accumulators add up by :meth:`merge`."""
        return self.sums.state()

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the state of another accumulator of the same kind."""
        self.sums.merge(state)

    def reset(self) -> None:
        """Forget everything seen."""
        self.sums.reset()


def count(size: int | tuple[int, ...] = ()) -> Tensor:
    """An int64 zero."""
    return torch.zeros(size, dtype=torch.int64)


def real(size: int | tuple[int, ...] = ()) -> Tensor:
    """A float64 zero."""
    return torch.zeros(size, dtype=torch.float64)


def ratio(numerator: Tensor | float, denominator: Tensor | float) -> float:
    """``numerator / denominator`` as a float, NaN when nothing was counted."""
    denominator = float(denominator)
    return float(numerator) / denominator if denominator else float("nan")


def reduce_over_processes(metric: Metric, group: dist.ProcessGroup | None = None) -> None:
    """Replace the metric's sums by those over all processes of ``group``; nothing happens without a process group.

    Call once, after the last ``update`` and before ``compute``; a second call would count everything again.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    # NCCL reduces CUDA tensors only; the sums live on the CPU.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    totals = {}
    for name, value in metric.state().items():
        value = value.to(device)
        dist.all_reduce(value, group=group)
        totals[name] = value
    metric.reset()
    metric.merge(totals)
