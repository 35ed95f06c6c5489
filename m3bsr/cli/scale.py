"""``tools/scale.py``: one run in 1, 2, 4 ... processes: whether they train the same weights, and how fast.

Every step has the same images however many processes share them: each has micro-batches of ``--batch-size`` and fewer
of them the more there are. The processes live through all rounds, numbers of processes take turns within a round, and
every process has one thread, so that throughputs can be compared.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from m3bsr.build import build_model, build_optimizer, build_scheduler, build_tasks
from m3bsr.cli.common import one_line_errors, pick_device
from m3bsr.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, Plan, TrainConfig
from m3bsr.engine import train
from m3bsr.engine.distributed import processes
from m3bsr.engine.rng import seed_everything
from m3bsr.engine.shards import shard, whole

TOLERANCE = 1e-3
"""Largest difference of a weight, as a part of the largest change that training made to any."""


@dataclass(frozen=True)
class Job:
    """What every process is told."""

    numbers: tuple[int, ...]
    rounds: int
    steps: int
    batch_size: int
    parallel: str
    precision: str
    device: str
    folder: str
    ports: tuple[int, ...]

    def path(self, number: int) -> Path:
        return Path(self.folder) / f"{number}.pt"


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 if the weights differ, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/scale.py", description="One run in several processes.")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of each run; the first is not timed")
    parser.add_argument("--batch-size", type=int, default=2, help="images of a micro-batch of a process")
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "experts"), default="ddp")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if min(*args.processes, args.rounds, args.steps - 1, args.batch_size) < 1:
        raise ValueError("--processes, --rounds and --batch-size must be positive, --steps at least 2")
    numbers, most = (1, *sorted({*args.processes} - {1})), max(args.processes)
    if any(most % number for number in numbers):
        raise ValueError(f"--processes {most}: every number must divide the largest, for steps of as many images")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            numbers,
            args.rounds,
            args.steps,
            args.batch_size,
            args.parallel,
            args.precision,
            pick_device(args.device).type,
            folder,
            free_ports(args.rounds * len(numbers)),
        )
        context = mp.get_context("spawn")
        mp.start_processes(_process, (job, context.Barrier(most)), nprocs=most, start_method="spawn")
        found = {number: torch.load(job.path(number), weights_only=True) for number in numbers}
    lines, is_equal = table(job, found)
    print("\n".join(lines))
    return 0 if is_equal else 1


def free_ports(num: int) -> tuple[int, ...]:
    """Ports that nobody listens on now."""
    probes = [socket.socket() for _ in range(num)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = tuple(probe.getsockname()[1] for probe in probes)
    for probe in probes:
        probe.close()
    return ports


def table(job: Job, found: dict[int, dict[str, Any]]) -> tuple[list[str], bool]:
    """The lines to print, and whether all weights are those of one process."""
    images = job.batch_size * max(job.numbers)
    lines = [
        f"{job.parallel}, {job.precision}, {job.device}, {os.cpu_count()} cores, one thread a process: "
        f"{job.steps} steps of {images} images, {job.rounds} rounds in turns",
        f"{'processes':>9} {'images/s':>9} {'of one':>7} {'largest difference of a weight':>31} {'of training':>12}",
    ]
    one, is_equal = found[1], True
    moved = max(float((one["weights"][n] - start).abs().max()) for n, start in one["start"].items())
    for number, run in found.items():
        speeds = [images / seconds for seconds in run["step_s"]]
        ratio = statistics.median(a / b for a, b in zip(one["step_s"], run["step_s"], strict=True))
        off = max(float((run["weights"][n] - w).abs().max()) for n, w in one["weights"].items())
        is_equal &= off <= TOLERANCE * moved
        lines.append(f"{number:>9} {statistics.median(speeds):>9.2f} {ratio:>7.2f} {off:>31.2e} {off / moved:>12.1e}")
    return [*lines, "equal" if is_equal else f"NOT equal: more than {TOLERANCE:g} of what training changed"], is_equal


def _process(rank: int, job: Job, barrier: Any) -> None:
    torch.set_num_threads(1)
    ports = iter(job.ports)
    for _ in range(job.rounds):
        for number in job.numbers:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(next(ports))
            )
            os.environ["WORLD_SIZE"] = str(number)
            if rank < number:
                with processes(torch.device(job.device), timeout_s=300) as device:
                    step_s, start, weights = run_once(job, number, device)
                if rank == 0:
                    path = job.path(number)
                    before = torch.load(path, weights_only=True)["step_s"] if path.exists() else []
                    torch.save({"step_s": [*before, step_s], "start": start, "weights": weights}, path)
            barrier.wait()


def run_once(job: Job, number: int, device: torch.device) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Train: median seconds of a step, and the trained weights before and after."""
    config = config_of(job, number)
    seed_everything(0)
    model = build_model(config).to(device)
    start = trained(model)
    if job.parallel == "fsdp":
        shard(model)
    optimizer, train_set = build_optimizer(config, model), Pictures(4 * job.batch_size * max(job.numbers))
    with tempfile.TemporaryDirectory() as run_dir:
        result = train(
            model,
            build_tasks(config),
            train_set,
            Pictures(1),
            optimizer,
            build_scheduler(config, optimizer, train_set),  # type: ignore[arg-type]
            run_dir=run_dir,
            config_dict=config.to_dict(),
            epochs=config.train.epochs,
            max_steps=job.steps,
            batch_size=job.batch_size,
            accumulate=config.train.accumulate,
            precision=job.precision,
            balance_weight=config.moe.balance_weight,
            expert_parallel=number if job.parallel == "experts" else 1,
            eval_every=0,
            device=device,
            tensorboard=False,
            progress_bar=False,
        )
    return statistics.median(result.step_ms[1:]) / 1000, start, trained(model)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights that train, whole and on the CPU."""
    return {name: whole(p.detach()).cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def config_of(job: Job, number: int) -> Config:
    """A small M3ViT with experts in three blocks, fine-tuned by BSR on two tasks, 96x96."""
    return Config(
        data=DataConfig(tasks=("semseg", "depth"), image_size=Pictures.SIZE),
        model=ModelConfig(backbone="m3vit_tiny_patch16", head_dim=32),
        moe=MoEConfig(blocks=(7, 9, 11), num_experts=8, top_k=2),
        bsr=Plan(train_blocks=(7, 9, 11), drop_blocks=(3, 6), keep_rate=0.7),
        train=TrainConfig(
            epochs=job.steps, max_steps=job.steps, batch_size=job.batch_size, accumulate=max(job.numbers) // number
        ),
        # Adam would blow rounding errors up where a true gradient is zero.
        optim=OptimConfig(name="sgd", lr=0.01),
    )


class Pictures:
    """Noise with labels, the same for an index in every process."""

    SIZE = (96, 96)

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {
            "image": torch.randn(3, *self.SIZE, generator=generator),
            "semseg": torch.randint(0, 40, (1, *self.SIZE), generator=generator).float(),
            "depth": 1 + torch.rand(1, *self.SIZE, generator=generator),
            "name": str(index),
            "index": index,
        }
