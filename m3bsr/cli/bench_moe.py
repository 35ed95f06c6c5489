"""Times an MoE layer, per backend, against dense MLPs of equal FLOPs: ratios within one run.

Forward and backward, all gradients. Every round draws a fresh routing and runs all variants in turn, so that a busy
machine slows them alike; the numbers are medians of the rounds' ratios. Two dense references of equal FLOPs:
`rows` is the MLP `D -> H -> D` on T * K rows (the experts' own GEMM shapes, fused into one), `wide` is
`D -> K * H -> D` on T rows (the layer that a dense model would have).

Last, one call of a task-gated M3ViT for four tasks against four calls of one task each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from m3bsr.backbones import MoEVisionTransformer
from m3bsr.moe import MoEMlp
from m3bsr.moe.backends import BACKENDS, run_experts
from m3bsr.utils.malloc import keep_freed_memory

# tokens, embed_dim, hidden_dim, experts, top-k, and the aim for the default backend against `rows`
SIZES = (
    (6000, 384, 384, 16, 4, 1.17),
    (6000, 384, 1536, 16, 4, 1.08),
    (800, 768, 3072, 16, 4, 1.2),
    (800, 384, 384, 16, 4, 1.3),
)
# How uneven the drawn routing is: std of a bias per expert; gives a fullest expert of about 2.5 times the mean.
SKEW = 0.8
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class BenchArgs:
    """Options of the benchmark."""

    backends: tuple[str, ...] = ("grouped", "low_memory", "grouped_mm", "loop")
    rounds: int = 9
    """Rounds per size; the first is not counted."""
    sizes: tuple[int, ...] = (0, 1, 2, 3)
    """Which of the sizes to run."""
    four_tasks: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Also time four tasks in one call against one at a time (M3ViT-tiny, MoE at 7, 9, 11; aim 0.6)."""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    """CPU threads; None leaves torch's own choice."""
    clock: Literal["wall", "cpu"] = "wall"
    """`cpu` counts this process's CPU time: with one thread, a fair clock on a busy machine."""
    keep_memory: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Use the allocator helper (`m3bsr.utils.malloc`), as training does when asked to."""


def draw_routing(num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Skewed random weights and choices `[T, K]`."""
    bias = torch.randn(num_experts, generator=generator) * SKEW
    scores, experts = (torch.randn(num_tokens, num_experts, generator=generator) + bias).topk(top_k, dim=-1)
    return torch.softmax(scores, -1), experts


def time_ms(run: Callable[[], Tensor], parameters: Sequence[Tensor], grad: Tensor, clock: str) -> float:
    """One forward and backward, in milliseconds."""
    now = CLOCKS[clock]
    for parameter in parameters:
        parameter.grad = None
    _synchronize(grad)
    start = now()
    run().backward(grad)
    _synchronize(grad)
    return (now() - start) * 1e3


def _synchronize(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def dense_mlp(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def bench_size(size: tuple[int, int, int, int, int], args: BenchArgs) -> dict[str, list[float]]:
    """Milliseconds of each round: `rows`, `wide`, each backend, and `layer` (backend auto, with its gate)."""
    num_tokens, dim, hidden, num_experts, top_k = size
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    moe = MoEMlp(dim, hidden, num_experts, top_k).to(device, dtype)
    rows, wide = dense_mlp(dim, hidden).to(device, dtype), dense_mlp(dim, hidden * top_k).to(device, dtype)
    times: dict[str, list[float]] = {name: [] for name in ("rows", "wide", *args.backends, "layer")}
    for _ in range(args.rounds):
        x_TD = torch.randn(num_tokens, dim, generator=generator).to(device, dtype).requires_grad_()
        many_ND = torch.randn(num_tokens * top_k, dim, generator=generator).to(device, dtype).requires_grad_()
        weights_TK, experts_TK = draw_routing(num_tokens, num_experts, top_k, generator)
        weights_TK, experts_TK = weights_TK.to(device, dtype).requires_grad_(), experts_TK.to(device)
        grad_TD, grad_ND = torch.randn_like(x_TD), torch.randn_like(many_ND)
        inputs = [x_TD, many_ND, weights_TK]
        times["rows"].append(time_ms(partial(rows, many_ND), [*rows.parameters(), *inputs], grad_ND, args.clock))
        times["wide"].append(time_ms(partial(wide, x_TD), [*wide.parameters(), *inputs], grad_TD, args.clock))
        for name in args.backends:
            run = partial(run_experts, x_TD, weights_TK, experts_TK, moe.experts, name)
            times[name].append(time_ms(run, [*moe.parameters(), *inputs], grad_TD, args.clock))
        times["layer"].append(
            time_ms(partial(_whole_layer, x_TD, moe), [*moe.parameters(), *inputs], grad_TD, args.clock)
        )
    return {name: values[1:] for name, values in times.items()}


def _whole_layer(x_TD: Tensor, moe: MoEMlp) -> Tensor:
    y_BND, routing = moe(x_TD[None], ("task",))
    return y_BND[0] + 0.01 * routing.balance_loss


def bench_tasks(args: BenchArgs, image_size: tuple[int, int] = (160, 224)) -> dict[str, float]:
    """Median ratio of four tasks in one call to four calls, `forward` (no graph) and `step` (forward and backward)."""
    tasks = ("semseg", "depth", "normals", "edge")
    torch.manual_seed(0)
    vit = MoEVisionTransformer(
        img_size=image_size,
        patch_size=16,
        embed_dim=192,
        depth=12,
        num_heads=3,
        mlp_ratio=4,
        moe_blocks=(7, 9, 11),
        num_experts=16,
        top_k=4,
        moe_mlp_ratio=1,
        tasks=tasks,
    ).to(args.device)
    images = torch.randn(2, 3, *image_size, device=args.device)
    one = torch.ones((), device=args.device)
    parameters = list(vit.parameters())

    def loss(asked: Sequence[str]) -> Tensor:
        return torch.stack([features.square().mean() for features in vit(images, asked).values()]).sum()

    def forward_ms(asked: Sequence[str]) -> float:
        with torch.no_grad():
            start = CLOCKS[args.clock]()
            loss(asked).item()
            return (CLOCKS[args.clock]() - start) * 1e3

    ratios: dict[str, list[float]] = {"forward": [], "step": []}
    for _ in range(args.rounds):
        ratios["forward"].append(forward_ms(tasks) / sum(forward_ms((task,)) for task in tasks))
        together = time_ms(partial(loss, tasks), parameters, one, args.clock)
        apart = sum(time_ms(partial(loss, (task,)), parameters, one, args.clock) for task in tasks)
        ratios["step"].append(together / apart)
    return {name: statistics.median(values[1:]) for name, values in ratios.items()}


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(BenchArgs, args=argv, description=__doc__)
    for name in args.backends:
        if name not in BACKENDS:
            raise SystemExit(f'--backends: unknown backend "{name}"; known: {", ".join(BACKENDS)}')
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = keep_freed_memory() if args.keep_memory else False
    print(
        f"MoE layer / dense MLP of equal FLOPs, forward and backward, {args.dtype} on {args.device}, "
        f"{args.clock} time, {torch.get_num_threads()} threads, allocator {'keeps memory' if kept else 'as it is'}, "
        f"{args.rounds - 1} rounds"
    )
    for index in args.sizes:
        size, aim = SIZES[index][:5], SIZES[index][5]
        times = bench_size(size, args)
        print(f"\ntokens {size[0]}, dim {size[1]}, width {size[2]}, experts {size[3]}, top-k {size[4]} (aim {aim})")
        for name, values in times.items():
            to_rows = statistics.median(a / b for a, b in zip(values, times["rows"], strict=True))
            to_wide = statistics.median(a / b for a, b in zip(values, times["wide"], strict=True))
            print(f"  {name:<11}{statistics.median(values):9.1f} ms   x rows {to_rows:5.2f}   x wide {to_wide:5.2f}")
    if args.four_tasks:
        ratios = bench_tasks(args)
        forward, step = ratios["forward"], ratios["step"]
        print(
            f"\nfour tasks in one call / four calls: forward {forward:.2f}, forward and backward {step:.2f} (aim 0.6)"
        )
