"""Parameters, times, and the report of a step."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn

from m3bsr.cost import measure_step, optimizer_state_bytes, paired_ratio, parameter_cost, time_interleaved
from m3bsr.cost.timing import Timing


def tied_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    return model


def test_shared_parameters_count_once() -> None:
    cost = parameter_cost(tied_model())
    assert (cost.trainable, cost.total) == (24, 24)
    assert cost.gradient_bytes == 96
    assert cost.parameter_bytes == 96 + 4 * 4 * 2 + 8  # running mean and variance, and a counter of 8 bytes


def test_frozen_parameters_have_no_state() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    assert optimizer_state_bytes(optimizer) == 0
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == 2 * 18 * 4 + 2 * 4  # two moments; a step counter per tensor


def test_report() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
    x, y = torch.randn(32, 64), torch.randint(10, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    report = measure_step(
        model,
        {"image": x, "label": [y]},
        lambda m, batch: nn.functional.cross_entropy(m(batch["image"]), batch["label"][0]),
        optimizer,
        batch_size=32,
        clip_norm=1.0,
        repeats=3,
    )
    macs = 64 * 128 + 128 * 10
    weights = 64 * 128 + 128 + 128 * 10 + 10
    assert report.forward_gmacs == pytest.approx(macs / 1e9)
    assert report.train_step_gmacs == pytest.approx((3 * macs - 64 * 128) / 1e9)
    assert report.gmacs_by_module["2"] == pytest.approx((1280 / 1e9, 2 * 1280 / 1e9))
    assert report.trainable_params == report.total_params == weights
    assert report.state_bytes == report.gradient_bytes == 4 * weights
    # GELU's input and output, and the log-softmax (with the scalar weight of the loss).
    assert report.saved_bytes_per_sample == pytest.approx(4 * (2 * 128 + 10), abs=4)
    lasting = 2 * 4 * weights + x.nbytes + y.nbytes
    assert report.measured_peak_bytes >= lasting + 4 * weights
    assert report.measured_peak_bytes < lasting + 3 * 4 * weights + 32 * 4 * 600
    assert report.step_ms > 0 and report.step_ms_quartiles[0] <= report.step_ms <= report.step_ms_quartiles[1]
    keys = "trainable_params total_params forward_gmacs train_step_gmacs saved_bytes_per_sample state_bytes"
    written = json.loads(json.dumps(report.to_dict()))
    assert set(keys.split()) | {"measured_peak_bytes", "step_ms"} <= set(written)


def test_rounds_are_interleaved_and_reversed() -> None:
    calls: list[str] = []
    fns = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = time_interleaved(fns, repeats=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert all(len(t.seconds) == 3 for t in timings.values())
    with pytest.raises(ValueError, match="repeats"):
        time_interleaved(fns, repeats=0)


def test_times_are_real() -> None:
    timing = time_interleaved({"sleep": lambda: time.sleep(0.01)}, repeats=3, warmup=0)["sleep"]
    assert timing.median_ms >= 10


def test_paired_ratio_ignores_a_common_disturbance() -> None:
    slow, fast = Timing((2.0, 20.0, 2.0, 2.0)), Timing((1.0, 10.0, 1.0, 4.0))
    assert paired_ratio(slow, fast) == 2.0
    assert slow.median_ms == 2000
    assert Timing((1.0,)).spread_ms == (1000.0, 1000.0)
