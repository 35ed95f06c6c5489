"""``tools/measure_cost.py CONFIG``: what a training step of a config costs, counted and measured at its real size."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m3bsr.build import build_model, build_optimizer, build_tasks
from m3bsr.cli.common import one_line_errors, pick_device, take_number
from m3bsr.cli.options import parse_cli
from m3bsr.config import Config
from m3bsr.cost import CostReport
from m3bsr.engine.predict_cost import predict
from m3bsr.engine.rng import seed_everything
from m3bsr.engine.step_cost import StepJob
from m3bsr.report.html import number
from m3bsr.report.run import megabytes

DESCRIPTION = (
    "Cost of a training step of CONFIG on synthetic images; --method M fine-tunes by M (full, head, lora ...), --json "
    "prints JSON, --repeats N times N steps (default 5)."
)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a user error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    arguments = [a for a in arguments if a != "--json"]
    repeats = take_number(arguments, "--repeats", 5)
    arguments = ["--model.method" if a == "--method" else a for a in arguments]
    config, _ = parse_cli(arguments, DESCRIPTION)
    job = step_job(config)
    predicted = predicted_peak(job)  # first: steps change the weights, and may change more
    report = job.measure(repeats)
    as_data = report.to_dict() | {"predicted_peak_bytes": predicted}
    print(json.dumps(as_data, indent=2) if as_json else as_text(report, predicted))
    return 0


def predicted_peak(job: StepJob) -> int | None:
    """The peak of the step as the formulas have it; None for blocks, or methods, without a formula."""
    try:
        return predict(job).peak_bytes
    except ValueError:
        return None


def step_job(config: Config, model: nn.Module | None = None) -> StepJob:
    """The training step of a config at its real size, on synthetic images.

    Args:
        model: used instead of a new one; its weights change when the step runs.

    Raises:
        ValueError, FileNotFoundError: as ``build_model`` does.
    """
    device = pick_device(config.run.device)
    seed_everything(config.run.seed)
    model = (build_model(config) if model is None else model).to(device).train()
    return job_of(config, model, device, torch.randn)


def job_of(config: Config, model: nn.Module, device: torch.device, image: Callable[..., Tensor]) -> StepJob:
    """The training step of a model of a config, on ``image(B, 3, H, W)`` and targets of zeros."""
    tasks, batch_size, size = build_tasks(config), config.train.batch_size, config.data.image_size
    if config.data.sets:  # every batch comes from one of them
        tasks = dict(list(tasks.items())[:1])
    batch = {"image": image(batch_size, 3, *size)}
    batch |= {name: task.example_target(batch_size, size) for name, task in tasks.items()}
    return StepJob(
        model,
        tasks,
        batch,
        build_optimizer(config, model),
        device=device,
        precision=config.train.precision,
        clip_norm=config.train.clip_norm,
        loss_weights=config.loss.weights,
        loss_stride=config.loss.stride,
        balance_weight=config.moe.balance_weight,
        z_weight=config.moe.z_weight,
        ema_decay=config.train.ema_decay,
    )


def measure(config: Config, *, model: nn.Module | None = None, repeats: int = 5) -> CostReport:
    """Measure a step as training would run it: batch, precision, losses, optimizer of the config (:func:`step_job`)."""
    return step_job(config, model).measure(repeats)


def as_text(report: CostReport, predicted: int | None = None) -> str:
    """The report for people; ``predicted``: peak in bytes."""
    low, high = report.step_ms_quartiles
    again = f", {number(report.fused_again_gmacs, 3)} of it Q K^T again in fused attention"
    lines = [
        ("trained parameters", f"{report.trainable_params:,} of {report.total_params:,}"),
        ("forward pass", f"{number(report.forward_gmacs)} GMACs a sample"),
        (
            "training step",
            f"{number(report.train_step_gmacs)} GMACs a sample{again if report.fused_again_gmacs else ''}",
        ),
        ("stored for backward", f"{megabytes(report.saved_bytes_per_sample)} a sample"),
        ("gradients", megabytes(report.gradient_bytes)),
        ("optimizer state", megabytes(report.state_bytes)),
        ("predicted peak", "no formula" if predicted is None else megabytes(predicted)),
        ("measured peak", f"{megabytes(report.measured_peak_bytes)}, batch {report.batch_size}"),
        ("step time", f"{number(report.step_ms, 3)} ms ({number(low, 3)} to {number(high, 3)}), {report.device}"),
    ]
    text = [f"{name:<20} {value}" for name, value in lines]
    modules = by_part(report.gmacs_by_module)
    width = max(map(len, modules), default=0)
    text += ["", f"{'GMACs a sample':<{width}}  forward  backward"]
    text += [f"{name:<{width}}  {forward:7.3f}  {backward:8.3f}" for name, (forward, backward) in modules.items()]
    return "\n".join(text)


def by_part(modules: Any) -> dict[str, tuple[float, float]]:
    """Counts by module with each head as one line."""
    sums: dict[str, tuple[float, float]] = {}
    for name, (forward, backward) in modules.items():
        parts = name.split(".")
        part = ".".join(parts[:2] if parts[0] == "heads" else parts) or "(attention, scores)"
        before = sums.get(part, (0.0, 0.0))
        sums[part] = (before[0] + forward, before[1] + backward)
    return sums
