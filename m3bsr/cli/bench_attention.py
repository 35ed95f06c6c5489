"""``tools/bench_attention.py``: attention written out beside the fused kernel, the measurement behind
``m3bsr.bsr.attention.use_explicit_attention``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from m3bsr.bsr.attention import explicit_attention, use_explicit_attention
from m3bsr.cli.common import one_line_errors, pick_device
from m3bsr.cost import paired_ratio, time_interleaved
from m3bsr.utils.malloc import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEAD_DIM = 64


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/bench_attention.py", description="Explicit beside fused attention.")
    parser.add_argument("--tokens", nargs="+", type=int, default=[28, 52, 100, 197, 512, 1025])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if min(args.batch_size, args.heads, args.rounds, *args.tokens) < 1:
        raise ValueError("--tokens, --batch-size, --heads and --rounds must be positive")
    device = pick_device(args.device)
    keep_freed_memory()
    print(f"time of explicit over fused attention, batch {args.batch_size}, {args.heads} heads of {HEAD_DIM}, {device}")
    print(f"{'tokens':>6} {'dtype':>6} {'forward':>9} {'with backward':>14}  taken with backward")
    for dtype in args.dtypes:
        for tokens in args.tokens:
            shape = (args.batch_size, args.heads, tokens, HEAD_DIM)
            forward, both = ratios(shape, DTYPES[dtype], device, args.rounds)
            explicit = use_explicit_attention(device, DTYPES[dtype], tokens, needs_grad=True)
            taken = "explicit" if explicit else "fused"
            print(f"{tokens:>6} {dtype:>6} {forward:>9.2f} {both:>14.2f}  {taken}", flush=True)
    return 0


def ratios(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, rounds: int
) -> tuple[float, float]:
    """Time of the explicit form over the fused one, forward alone and with its backward pass; timed in turns."""
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    forms: dict[str, Callable[[], torch.Tensor]] = {
        "explicit": lambda: explicit_attention(q, k, v, HEAD_DIM**-0.5),
        "fused": lambda: F.scaled_dot_product_attention(q, k, v),
    }

    def with_backward(form: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(form().sum(), (q, k, v))

    def forward(form: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return torch.no_grad()(form)

    found = []
    for wrap in (forward, with_backward):
        times = time_interleaved({name: wrap(form) for name, form in forms.items()}, repeats=rounds, device=device)
        found.append(paired_ratio(times["explicit"], times["fused"]))
    return found[0], found[1]
