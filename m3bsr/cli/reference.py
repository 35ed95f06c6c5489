"""``tools/reference.py``: published counts of multiply-accumulates beside ours, with the deviation.

The published counts write attention out. Fused attention, which is what runs here, computes Q K^T once more in its
backward pass: that is work done, so ``tools/measure_cost.py`` counts it, and both numbers stand here. Nothing is
computed: the models are on tensors without content, so the table takes no memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from m3bsr.build import build_model
from m3bsr.cli.common import one_line_errors
from m3bsr.config import Config, DataConfig, ModelConfig, Plan
from m3bsr.cost import MacCount, count_macs

TOLERANCE = 0.01
NUM_CLASSES, SIZE = 10, (224, 224)
BLOCKS = Plan(train_blocks=(3, 7, 11))
# Row: method, plan, and per model the published GMACs a sample: forward pass (0: not published), training step.
ROWS: dict[str, tuple[str, Plan]] = {
    "full": ("full", Plan()),
    "bitfit": ("bitfit", Plan()),
    "head": ("head", Plan()),
    "bsr, nothing dropped": ("bsr", BLOCKS),
    "bsr .7": ("bsr", Plan((3, 7, 11), drop_blocks=(3, 6, 9), keep_rate=0.7, score_source="own")),
    "bsr .5": ("bsr", Plan((3, 7, 11), drop_blocks=(3, 6, 9), keep_rate=0.5, score_source="own")),
}
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "vit_base_patch16_224": {
        "full": (17.563, 52.57),
        "bitfit": (17.563, 35.73),
        "head": (17.563, 17.56),
        "bsr, nothing dropped": (17.563, 35.37),
        "bsr .7": (0, 21.30),
        "bsr .5": (8.819, 14.78),
    },
    "deit_small_patch16_224": {
        "full": (4.60, 13.74),
        "bitfit": (4.60, 9.50),
        "head": (4.60, 4.60),
        "bsr, nothing dropped": (4.60, 9.32),
        "bsr .7": (0, 5.56),
        "bsr .5": (0, 3.86),
    },
}


class Point(NamedTuple):
    """One count, in GMACs a sample."""

    model: str
    row: str
    what: str
    """``forward`` or ``step``."""
    published: float
    ours: float
    """Attention written out."""
    as_run: float
    """With fused attention's second Q K^T."""

    @property
    def deviation(self) -> float:
        return self.ours / self.published - 1


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 if a count is further than 1 % from the published one; 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/reference.py", description="Published GMACs beside ours.")
    parser.add_argument("--models", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    print(f"{'GMACs a sample':<24}{'':<22}{'':<9}{'published':>10}{'ours':>9}{'deviation':>11}{'as run (fused)':>16}")
    worst = 0.0
    for model in args.models:
        for p in points(model):
            worst = max(worst, abs(p.deviation))
            print(
                f"{p.model:<24}{p.row:<22}{p.what:<9}{p.published:>10.3f}{p.ours:>9.3f}{p.deviation:>+11.2%}"
                f"{p.as_run:>16.3f}",
                flush=True,
            )
    print(f"largest deviation {worst:.2%} (wanted: at most {TOLERANCE:.0%}), attention written out as published;")
    print("fused attention, which runs here, computes Q K^T again in its backward pass: the last column has it.")
    return int(worst > TOLERANCE)


def points(model: str) -> Iterator[Point]:
    """The published points of a model, counted."""
    for row, (forward, step) in PUBLISHED[model].items():
        count = count_step(model, *ROWS[row])
        if forward:
            yield Point(model, row, "forward", forward, count.forward / 1e9, count.forward / 1e9)
        yield Point(model, row, "step", step, (count.total - count.fused_again) / 1e9, count.total / 1e9)


def count_step(model: str, method: str, plan: Plan) -> MacCount:
    """Operations of a forward and backward pass of one image, on tensors without content."""
    config = Config(
        data=DataConfig(
            name="image_folder",
            tasks=("classification",),
            image_size=SIZE,
            num_classes={"classification": NUM_CLASSES},
        ),
        model=ModelConfig(backbone=model, method=method),
        bsr=plan,
    )
    with torch.device("meta"):
        network = build_model(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu").train()
        images = torch.empty(1, 3, *SIZE)
        return count_macs(lambda: network(images).predictions["classification"].sum().backward(), network)
