"""``tools/bench.py``: block selective reprogramming beside full fine-tuning, counted and timed in one run.

For ViT-B and DeiT-S at 224, batch 8, fp32, SGD: stored activation bytes a sample (MB = 2^20), GMACs of a training step
a sample, and step times taken in turns; full fine-tuning is timm's model as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3bsr.bsr import Plan, reprogram
from m3bsr.cli.common import one_line_errors
from m3bsr.cost import SavedBytes, count_macs, paired_ratio, time_interleaved
from m3bsr.utils.malloc import keep_freed_memory

MODELS = {"vit_base_patch16_224": "ViT-B", "deit_small_patch16_224": "DeiT-S"}
TRAIN, DROP, NUM_CLASSES, MB = (3, 7, 11), (3, 6, 9), 10, 2**20
# Keep rate of each row; None is timm's own model, all trained.
KEEP_RATES = {"full": None, "bsr": 1.0, "bsr .7": 0.7, "bsr .5": 0.5}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/bench.py", description="BSR beside full fine-tuning.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; every round runs every row once")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.batch_size < 1 or args.rounds < 1:
        raise ValueError("--batch-size and --rounds must be positive")
    keep_freed_memory()
    for name in args.models:
        print(f"\n{MODELS[name]} at 224, batch {args.batch_size}, fp32, SGD, {torch.get_num_threads()} threads")
        print(bench(name, args.batch_size, args.rounds), flush=True)
    return 0


def rows() -> dict[str, Plan | None]:
    """The plans to compare: every keep rate, and .5 with every way of storing less."""
    plans: dict[str, Plan | None] = {}
    for row, rate in KEEP_RATES.items():
        plans[row] = None if rate is None else plan(rate)
    for recompute in ("cheap", "frozen", "both"):
        plans[f"bsr .5, recompute {recompute}"] = plan(0.5, recompute)
    for recompute in ("none", "cheap"):
        plans[f"bsr .5, {recompute}, bf16 kept"] = replace(plan(0.5, recompute), activation_dtype="bf16")
    return plans


def plan(keep_rate: float, recompute: str = "none") -> Plan:
    return Plan(TRAIN, drop_blocks=DROP, keep_rate=keep_rate, score_source="own", recompute=recompute)  # type: ignore[arg-type]


def bench(name: str, batch_size: int, rounds: int) -> str:
    """The table of one model."""
    images, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(NUM_CLASSES, (batch_size,))
    steps: dict[str, Callable[[], None]] = {}
    stored, gmacs = {}, {}
    for row, chosen in rows().items():
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, num_classes=NUM_CLASSES)
        if chosen is not None:
            model = reprogram(model, chosen)  # type: ignore[arg-type]
        step = _step(model.train(), images, labels)
        steps[row] = step
        with SavedBytes(model, (images, labels)) as saved:
            kept = F.cross_entropy(model(images), labels)
        del kept
        stored[row], gmacs[row] = saved.bytes / batch_size / MB, count_macs(step, model).total / batch_size / 1e9
    times = time_interleaved(steps, repeats=rounds, warmup=1)
    lines = [f"{'':<24}{'stored, MB':>12}{'step, GMACs':>13}{'step, ms':>12}{'of full':>9}{'work of full':>14}"]
    for row, timing in times.items():
        share, work = paired_ratio(timing, times["full"]), gmacs[row] / gmacs["full"]
        lines.append(
            f"{row:<24}{stored[row]:>12.2f}{gmacs[row]:>13.2f}{timing.median_ms:>12.0f}{share:>9.3f}{work:>14.3f}"
        )
    return "\n".join(lines)


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step
