"""``tools/bench_heads.py``: what each head costs, and its share of a training step, all timed in turns in one run.

The share is that of everything behind the blocks, heads and losses: one minus the time of a step of the backbone alone
(its output summed up for a loss) over that of the whole step.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence

import torch

from m3bsr.cli.bench import CLOCKS
from m3bsr.cli.common import one_line_errors, pick_device
from m3bsr.cli.measure_cost import step_job
from m3bsr.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    Plan,
    RunConfig,
    TrainConfig,
    replace,
)
from m3bsr.cost import count_macs, paired_ratio, time_interleaved
from m3bsr.engine.losses import loss_size
from m3bsr.engine.precision import autocast
from m3bsr.engine.step_cost import StepJob
from m3bsr.heads import HEADS
from m3bsr.models import MultiTaskModel
from m3bsr.utils.malloc import keep_freed_memory

REFINE = "+refine"


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/bench_heads.py", description="Heads and losses in a training step.")
    parser.add_argument("--backbone", default="deit_tiny_patch16_224", help="any timm VisionTransformer")
    parser.add_argument("--tasks", nargs="+", default=["semseg", "depth"])
    parser.add_argument("--size", default="240x320", help="height x width of the images")
    parser.add_argument("--heads", nargs="+", default=[*HEADS, f"light{REFINE}"], help=f"NAME, or NAME{REFINE}")
    parser.add_argument("--strides", nargs="+", type=int, default=[1, 4], help="losses at 1/stride of the resolution")
    parser.add_argument("--train-blocks", nargs="*", type=int, help="only these blocks train (default: everything)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; every round runs every row once")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    size = re.fullmatch(r"(\d+)x(\d+)", args.size)
    if size is None:
        raise ValueError(f"--size must be height x width, such as 240x320, got {args.size!r}")
    if min(args.batch_size, args.rounds, *args.strides) < 1:
        raise ValueError("--batch-size, --rounds and --strides must be positive")
    base = Config(
        data=DataConfig(tasks=tuple(args.tasks), image_size=(int(size[1]), int(size[2]))),
        model=ModelConfig(backbone=args.backbone),
        moe=MoEConfig(blocks=()),
        bsr=Plan() if args.train_blocks is None else Plan(train_blocks=tuple(args.train_blocks)),
        train=TrainConfig(batch_size=args.batch_size, precision=args.precision),
        optim=OptimConfig(),
        run=RunConfig(device=args.device),
    )
    keep_freed_memory()
    trained = "all blocks" if args.train_blocks is None else f"blocks {args.train_blocks}"
    print(
        f"{args.backbone} at {args.size}, {' and '.join(args.tasks)}, batch {args.batch_size}, {args.precision}, "
        f"{trained} trained, {pick_device(args.device)}, {torch.get_num_threads()} threads"
    )
    print(bench(base, args.heads, args.strides, args.rounds, args.clock), flush=True)
    return 0


def bench(base: Config, heads: Sequence[str], strides: Sequence[int], rounds: int, clock: str = "wall") -> str:
    """The table: a row for each head and stride; parameters and GMACs (an image, forward) of the heads of all tasks."""
    steps: dict[str, Callable[[], None]] = {}
    costs: dict[str, tuple[float, float]] = {}
    for head in heads:
        for stride in strides:
            job = step_job(replace(base, changes_of(head, stride)))
            row = f"{head}, stride {stride}"
            costs[row], steps[row] = cost_of_heads(job), job.runner()
            steps.setdefault("backbone", backbone_step(job))
    device = pick_device(base.run.device)
    times = time_interleaved(steps, repeats=rounds, warmup=1, device=device, clock=CLOCKS[clock])
    alone = times.pop("backbone")
    lines = [f"{'':<28}{'parameters, K':>14}{'GMACs':>8}{'step, ms':>10}{'of backbone':>13}{'share of heads':>16}"]
    lines.append(f"{'backbone alone':<28}{'':>14}{'':>8}{alone.median_ms:>10.0f}{1:>13.2f}{0:>16.2f}")
    for row, timing in times.items():
        params, gmacs = costs[row]
        lines.append(
            f"{row:<28}{params / 1e3:>14.0f}{gmacs:>8.2f}{timing.median_ms:>10.0f}{paired_ratio(timing, alone):>13.2f}"
            f"{1 - paired_ratio(alone, timing):>16.2f}"
        )
    return "\n".join(lines)


def changes_of(head: str, stride: int) -> dict[str, object]:
    """Config fields of a row; ``NAME+refine`` has cross-task refinement."""
    name = head.removesuffix(REFINE)
    return {"model.head": name, "model.refine_dim": 0 if name == head else 64, "loss": LossConfig(stride=stride)}


def cost_of_heads(job: StepJob) -> tuple[float, float]:
    """Parameters of the heads, and multiply-accumulates (1e9) of their forward pass for one image."""
    model, image = job.model, job.batch["image"][:1].to(job.device)
    assert isinstance(model, MultiTaskModel)

    def whole() -> None:
        model(image, size=loss_size(image, job.loss_stride))

    def blocks() -> None:
        model.backbone.forward_tasks(image)

    with torch.no_grad():
        macs = count_macs(whole).forward - count_macs(blocks).forward
    parts = [model.heads, *([] if model.refinement is None else [model.refinement])]
    return sum(p.numel() for part in parts for p in part.parameters()), macs / 1e9


def backbone_step(job: StepJob) -> Callable[[], None]:
    """A training step of the backbone alone."""
    model, images = job.model, job.batch["image"].to(job.device)
    assert isinstance(model, MultiTaskModel)

    def step() -> None:
        with autocast(job.device, job.precision):
            features = model.backbone.forward_tasks(images).features
        loss = torch.stack([x_BND.float().mean() for x_BND in features.values()]).sum()
        if loss.requires_grad:
            loss.backward()
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)

    return step
