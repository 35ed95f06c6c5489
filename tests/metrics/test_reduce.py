from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from m3bsr.metrics import DepthErrors, reduce_over_processes


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 1, 5, 7, generator=generator) * 9, torch.rand(6, 1, 5, 7, generator=generator) * 9 + 0.1


def worker(rank: int, store: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    metric = DepthErrors()
    prediction, target = data()
    shard = slice(0, 2) if rank == 0 else slice(2, 6)
    metric.update(prediction[shard], target[shard])
    reduce_over_processes(metric)
    results[rank] = metric.compute()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    metric = DepthErrors()
    metric.update(*data())
    reduce_over_processes(metric)  # no process group: changes nothing
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(worker, (str(tmp_path / "store"), results), nprocs=2, start_method="fork")
        for rank in range(2):
            assert results[rank] == pytest.approx(metric.compute(), rel=1e-12)
