"""All costs of one training step in one report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from m3bsr.cost.flops import MacCount, count_macs
from m3bsr.cost.memory import peak_growth
from m3bsr.cost.params import optimizer_state_bytes, optimizer_tensors, parameter_cost, storage_bytes
from m3bsr.cost.saved import SavedBytes
from m3bsr.cost.timing import time_steps

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class CostReport:
    """What one training step costs. GMACs and saved bytes are per sample, the rest is per step of `batch_size`."""

    trainable_params: int
    total_params: int
    forward_gmacs: float
    """Per sample, 10^9 multiply-accumulates, with the loss if it has any."""
    train_step_gmacs: float
    """Per sample: forward and backward as run, recomputation included; the optimizer's arithmetic is not."""
    saved_bytes_per_sample: int
    """Kept by autograd at the end of the forward pass, without parameters and inputs."""
    state_bytes: int
    """Optimizer state."""
    gradient_bytes: int
    measured_peak_bytes: int
    """Highest sum of everything alive in a step: parameters, buffers, state, inputs, activations, gradients."""
    step_ms: float
    """Median."""
    step_ms_quartiles: tuple[float, float]
    batch_size: int
    device: str
    fused_again_gmacs: float = 0.0
    """Of `train_step_gmacs`: Q K^T that fused attention computes a second time; counts on paper leave it out."""
    gmacs_by_module: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Per sample, forward and backward."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_step(
    model: nn.Module,
    inputs: Any,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    clip_norm: float | None = None,
    repeats: int = 5,
    warmup: int = 1,
    module_depth: int = 3,
) -> CostReport:
    """Run some training steps and measure them. The weights of `model` change; measure a copy if they matter.

    Args:
        inputs: whatever `loss_fn` takes: a tensor, or a (nested) sequence or dict of tensors, on the model's device.
        loss_fn: `loss_fn(model, inputs) -> scalar loss`.
        batch_size: samples in `inputs`.
        autocast: makes the context of the forward pass.
        clip_norm: clip gradients to this norm, as training does.
        repeats, warmup: timed and untimed steps. Times are taken first, so the counters do not disturb them.
        module_depth: parts of the module names in `gmacs_by_module`.
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss() -> Tensor:
        with autocast():
            return loss_fn(model, inputs)

    def step() -> None:
        loss().backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(trained, clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    optimizer.zero_grad(set_to_none=True)
    timing = time_steps(step, repeats=repeats, warmup=max(warmup, 1), device=device)
    peak = step_peak(step, model, optimizer, inputs)
    with SavedBytes(model, tensors_in(inputs)) as saved:
        kept = loss()
    del kept
    macs = count_macs(lambda: loss().backward(), model)
    optimizer.zero_grad(set_to_none=True)
    parameters = parameter_cost(model)
    return CostReport(
        trainable_params=parameters.trainable,
        total_params=parameters.total,
        forward_gmacs=macs.forward / batch_size / 1e9,
        train_step_gmacs=macs.total / batch_size / 1e9,
        saved_bytes_per_sample=saved.bytes // batch_size,
        state_bytes=optimizer_state_bytes(optimizer),
        gradient_bytes=parameters.gradient_bytes,
        measured_peak_bytes=peak,
        step_ms=timing.median_ms,
        step_ms_quartiles=timing.spread_ms,
        batch_size=batch_size,
        device=_device_name(device),
        fused_again_gmacs=macs.fused_again / batch_size / 1e9,
        gmacs_by_module=_per_sample(macs, batch_size, module_depth),
    )


def step_peak(step: Callable[[], None], model: nn.Module, optimizer: Optimizer, inputs: Any) -> int:
    """Run ``step`` once: the highest sum of all that was alive, parameters, buffers, state and inputs with it.

    Run it once before, so that the optimizer has its state."""
    device = next(model.parameters()).device
    growth = peak_growth(step, device)
    lasting = [*model.parameters(), *model.buffers(), *optimizer_tensors(optimizer), *tensors_in(inputs)]
    return storage_bytes(lasting, device) + growth


def _per_sample(macs: MacCount, batch_size: int, depth: int) -> dict[str, tuple[float, float]]:
    scale = batch_size * 1e9
    return {name: (fwd / scale, bwd / scale) for name, (fwd, bwd) in macs.by_module(depth).items()}


def tensors_in(inputs: Any) -> list[Tensor]:
    """All tensors of a nested structure of mappings and sequences."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes):
        return [tensor for item in inputs for tensor in tensors_in(item)]
    return []


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}"
