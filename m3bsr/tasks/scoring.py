"""Scoring in several processes: metrics are sums, so an image can be scored anywhere and its sums added."""

from __future__ import annotations

import multiprocessing
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from m3bsr.metrics.base import Metric
from m3bsr.tasks.base import Task


class Scorer:
    """``add`` updates a metric; a slow one (edges) image by image in other processes, if there are any.

    Use it as a context, and ``finish`` before the metrics are read. At most two images a process wait, so memory stays
    constant.

    Args:
        num_workers: other processes; with less than two of them everything is scored at once, in this process.
    """

    def __init__(self, num_workers: int = 0) -> None:
        self.num_workers = num_workers
        self.pool: ProcessPoolExecutor | None = None
        self.waiting: deque[tuple[Metric, Future[dict[str, np.ndarray]]]] = deque()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=kind is None, cancel_futures=True)

    def add(self, task: Task, metric: Metric, prediction: Tensor, target: Tensor, *, saved: bool = False) -> None:
        """Score raw predictions ``[B, C, H, W]``, or with ``saved`` those of files (see ``Task.add_saved``).

        Raises:
            ValueError: see the metric; possibly of an image that was added before. A process died.
        """
        if self.num_workers < 2 or not task.slow_metric:
            task.add_saved(metric, prediction, target) if saved else metric.update(prediction, target)
            return
        if self.pool is None:
            # Not fork: this process has threads, and may have a GPU.
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.num_workers, context, initializer=torch.set_num_threads, initargs=(1,))
        for p, t in zip(prediction.cpu().split(1), target.cpu().split(1), strict=True):
            while len(self.waiting) >= 2 * self.num_workers:
                self._take()
            self.waiting.append((metric, self.pool.submit(_sums, task, p.numpy(), t.numpy(), saved)))

    def finish(self) -> None:
        """Wait for what is still being scored."""
        while self.waiting:
            self._take()

    def _take(self) -> None:
        metric, future = self.waiting.popleft()
        try:
            sums = future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a process that scores edges died (out of memory, or a script without `if __name__ == '__main__'`); "
                "--num-workers 1 scores in this one"
            ) from None
        metric.merge({name: torch.from_numpy(value) for name, value in sums.items()})


def _sums(task: Task, prediction: np.ndarray, target: np.ndarray, saved: bool) -> dict[str, np.ndarray]:
    """The sums of one image. NumPy travels between processes without file descriptors, of which there are few."""
    metric = task.metric()
    p, t = torch.from_numpy(prediction), torch.from_numpy(target)
    task.add_saved(metric, p, t) if saved else metric.update(p, t)
    return {name: np.asarray(value) for name, value in metric.state().items()}
