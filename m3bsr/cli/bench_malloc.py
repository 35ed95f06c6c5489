"""``tools/bench_malloc.py``: what keeping freed memory (``m3bsr.utils.malloc``) is worth, on CPUs under Linux.

A dense MLP and an MoE layer, forward and backward, under both settings of the allocator in turns in one process; of
each turn the first run warms up and the second counts. Printed are page faults of a run and the share of its time.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from m3bsr.cli.common import one_line_errors
from m3bsr.moe import MoEMlp
from m3bsr.utils.malloc import keep_freed_memory, return_freed_memory

SETTINGS = {"returned": return_freed_memory, "kept": keep_freed_memory}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/bench_malloc.py", description="Freed memory kept, or returned.")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if min(args.tokens, args.dim, args.rounds) < 1:
        raise ValueError("--tokens, --dim and --rounds must be positive")
    if not keep_freed_memory():
        raise ValueError("only the allocator of glibc can be told to keep freed memory")
    torch.set_num_threads(1)  # so that the processor time is that of the layer
    print(f"{args.tokens} tokens, {args.dim} wide, forward and backward, fp32, one thread, processor time")
    print(f"{'':<12}{'faults, returned':>18}{'kept':>8}{'ms, returned':>14}{'kept':>8}{'share':>8}")
    for name, layer in layers(args.tokens, args.dim).items():
        faults, ms, share = compare(layer, args.rounds)
        print(
            f"{name:<12}{faults['returned']:>18.0f}{faults['kept']:>8.0f}"
            f"{ms['returned']:>14.1f}{ms['kept']:>8.1f}{share:>8.3f}"
        )
    return 0


def layers(num_tokens: int, dim: int) -> dict[str, Callable[[], None]]:
    """A step through a dense MLP four times as wide inside, and through 16 experts, 4 of them for a token."""
    torch.manual_seed(0)
    x_1ND = torch.randn(1, num_tokens, dim)
    dense = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
    experts = MoEMlp(dim, dim, 16, 4)

    def step(layer: nn.Module, run: Callable[[], torch.Tensor]) -> None:
        layer.zero_grad(set_to_none=True)
        run().square().mean().backward()

    return {
        "dense MLP": lambda: step(dense, lambda: dense(x_1ND)),
        "experts": lambda: step(experts, lambda: experts(x_1ND, ("task",))[0]),
    }


def compare(step: Callable[[], None], rounds: int) -> tuple[dict[str, float], dict[str, float], float]:
    """Medians of page faults and of milliseconds under both settings, and of the rounds' ratios, kept over returned."""
    faults: dict[str, list[float]] = {name: [] for name in SETTINGS}
    ms: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for number in range(rounds):
        for name in SETTINGS if number % 2 == 0 else reversed(SETTINGS):
            SETTINGS[name]()
            step()
            before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
            step()
            ms[name].append(1e3 * (time.process_time() - began))
            faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    share = statistics.median(kept / returned for kept, returned in zip(ms["kept"], ms["returned"], strict=True))
    return (
        {n: statistics.median(v) for n, v in faults.items()},
        {n: statistics.median(v) for n, v in ms.items()},
        share,
    )
