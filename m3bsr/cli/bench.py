"""``tools/bench.py``: block selective reprogramming beside full fine-tuning, counted and timed in one run.

For ViT-B and DeiT-S at 224, batch 8, fp32, SGD: stored activation bytes a sample (MB = 2^20), GMACs of a training step
a sample, and step times taken in turns; full fine-tuning is timm's model as it is. "prefix kept" reads what the frozen
blocks before the first trained one gave from files, as ``bsr.cache_prefix`` does from the second epoch on; the reading
is part of its time. "compiled" runs the blocks as ``train.compile`` does, after a step that compiles them; only on
request (``--rows``), since it needs a C++ compiler and minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3bsr.bsr import Plan, Prefix, ReprogrammedMixin, frozen_prefix, reprogram, state_tensors, with_tensors
from m3bsr.bsr.compiled import compile_blocks
from m3bsr.cli.common import one_line_errors
from m3bsr.cost import SavedBytes, count_macs, paired_ratio, time_interleaved
from m3bsr.engine.prefix_cache import PrefixFiles
from m3bsr.utils.malloc import keep_freed_memory

MODELS = {"vit_base_patch16_224": "ViT-B", "deit_small_patch16_224": "DeiT-S"}
TRAIN, DROP, NUM_CLASSES, MB = (3, 7, 11), (3, 6, 9), 10, 2**20
# Keep rate of each row; None is timm's own model, all trained.
KEEP_RATES = {"full": None, "bsr": 1.0, "bsr .7": 0.7, "bsr .5": 0.5}
# Rows that read the prefix from files, and the row whose plan they have.
KEPT = {"bsr, prefix kept": "bsr", "bsr .5, prefix kept": "bsr .5"}
# Rows whose blocks torch.compile compiles, and the row whose plan they have.
COMPILED = {"bsr, compiled": "bsr", "bsr .5, compiled": "bsr .5"}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/bench.py", description="BSR beside full fine-tuning.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; every round runs every row once")
    parser.add_argument(
        "--rows", nargs="+", choices=[*rows(), *KEPT, *COMPILED], help="only these; shares are of the first"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.batch_size < 1 or args.rounds < 1:
        raise ValueError("--batch-size and --rounds must be positive")
    keep_freed_memory()
    for name in args.models:
        print(f"\n{MODELS[name]} at 224, batch {args.batch_size}, fp32, SGD, {torch.get_num_threads()} threads")
        print(bench(name, args.batch_size, args.rounds, args.rows, args.clock), flush=True)
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


def bench(name: str, batch_size: int, rounds: int, only: Sequence[str] | None = None, clock: str = "wall") -> str:
    """The table of one model."""
    images, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(NUM_CLASSES, (batch_size,))
    steps: dict[str, Callable[[], None]] = {}
    stored, gmacs = {}, {}
    plans = rows()
    plans |= {row: plans[of] for row, of in KEPT.items()}
    shown = only or list(plans)
    plans |= {row: plans[of] for row, of in COMPILED.items()}
    with tempfile.TemporaryDirectory() as folder:
        for row in shown:
            torch.manual_seed(0)
            model: Any = timm.create_model(name, num_classes=NUM_CLASSES).train()
            chosen, forward = plans[row], model
            if chosen is not None:
                forward = model = reprogram(model, chosen)
            if row in COMPILED:
                compile_blocks(model)
            if row in KEPT:
                forward = _behind_files(model, images, Path(folder))
            steps[row] = step = _step(model, forward, images, labels)
            with SavedBytes(model, (images, labels)) as saved:
                kept = F.cross_entropy(forward(images), labels)
            del kept
            with torch.compiler.set_stance("force_eager"):  # operators inside compiled code are not seen
                gmacs[row] = count_macs(step, model).total / batch_size / 1e9
            stored[row] = saved.bytes / batch_size / MB
        times = time_interleaved(steps, repeats=rounds, warmup=1, clock=CLOCKS[clock])
    base = next(iter(times))
    lines = [f"{'':<24}{'stored, MB':>12}{'step, GMACs':>13}{'step, ms':>12}{f'of {base}':>12}{f'work of {base}':>18}"]
    for row, timing in times.items():
        share, work = paired_ratio(timing, times[base]), gmacs[row] / gmacs[base]
        lines.append(
            f"{row:<24}{stored[row]:>12.2f}{gmacs[row]:>13.2f}{timing.median_ms:>12.0f}{share:>12.3f}{work:>18.3f}"
        )
    return "\n".join(lines)


def _behind_files(model: ReprogrammedMixin, images: Tensor, folder: Path) -> Callable[[Tensor], Tensor]:
    """The forward pass of a model whose frozen prefix is read from files, one a sample."""
    num_blocks, _ = frozen_prefix(model, model.plan)
    state, _ = model.forward_tokens(images, stop=num_blocks)
    tensors = state_tensors(state)
    files = PrefixFiles(folder, {name: (tuple(t.shape[1:]), t.dtype) for name, t in tensors.items()})
    places = range(len(images))
    files.write_batch(tensors, places, places)

    def forward(images: Tensor) -> Tensor:
        read = files.read_batch(places, places)
        assert read is not None, "they were just written"
        last, _ = model.forward_tokens(images, prefix=Prefix(with_tensors(state, read), num_blocks))
        return model.forward_head(model.norm(last.x_BND))

    return forward


def _step(model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        optimizer.step()

    return step
