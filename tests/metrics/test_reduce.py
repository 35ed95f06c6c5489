"""Two gloo processes with unequal shares have the scores of one process, for the metric of every task."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from m3bsr.metrics import reduce_over_processes
from m3bsr.tasks import TASKS
from m3bsr.utils.constants import IGNORE


def data(name: str):
    """A task with six raw outputs and targets, some of them invalid."""
    generator = torch.Generator().manual_seed(0)
    if name == "classification":
        task = TASKS[name](num_classes=7)
        return task, torch.randn(6, 7, generator=generator), torch.randint(7, (6,), generator=generator)
    task = TASKS[name](thresholds=9) if name == "edge" else TASKS[name]()
    prediction = torch.randn(6, task.num_channels, 11, 9, generator=generator)
    target = torch.rand(6, 3 if name == "normals" else 1, 11, 9, generator=generator)
    if name in ("semseg", "human_parts"):
        target = (task.num_channels * target).long()
    elif name in ("edge", "saliency"):
        target = (target > 0.7).to(target.dtype)
    target[:, :, :2] = IGNORE
    return task, prediction, target


def worker(rank: int, store: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shard = slice(0, 2) if rank == 0 else slice(2, 6)
    for name in TASKS:
        task, prediction, target = data(name)
        metric = task.metric()
        metric.update(prediction[shard], target[shard])
        reduce_over_processes(metric)
        results[rank, name] = metric.compute()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(worker, (str(tmp_path / "store"), results), nprocs=2, start_method="fork")
        found = dict(results)
    assert len(found) == 2 * len(TASKS)
    for (_, name), scores in found.items():
        task, prediction, target = data(name)
        metric = task.metric()
        metric.update(prediction, target)
        reduce_over_processes(metric)  # no process group: changes nothing
        assert scores == pytest.approx(metric.compute(), rel=1e-12), name
