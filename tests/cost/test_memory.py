"""Measured peaks: arithmetic that is known, and the resident memory of a fresh process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m3bsr.cost import peak_growth

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 0.03  # measured: 0.1 to 1 %

SCRIPT = """
import json, torch
from torch import nn
from m3bsr.cost.memory import peak_growth, resident_growth
torch.set_num_threads(1)
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(192, 3, 768, 0.0, "gelu", batch_first=True, norm_first=True)
model = nn.Sequential(nn.Linear(64, 192), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
optimizer = torch.optim.AdamW(model.parameters())
x = torch.randn(8, 150, 64)
def step():
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
step()
print(json.dumps({"resident": resident_growth(step), "counted": peak_growth(step)}))
"""


def test_the_sum_of_allocations_is_exact() -> None:
    def work() -> None:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(5000, dtype=torch.uint8)
        del b
        c = torch.empty(3000, dtype=torch.uint8)
        del a, c

    assert peak_growth(work) == 6000


def test_temporaries_inside_an_operator_count() -> None:
    x = torch.randn(64, 64).to(torch.bfloat16)[:, ::2]
    # The result alone has 64 * 32 * 4 bytes; the operator makes copies on its way.
    assert peak_growth(lambda: torch.logsumexp(x.float(), 1)) > 64 * 32 * 4


def test_the_backward_pass_is_in_it() -> None:
    weight = torch.randn(256, 256, requires_grad=True)
    x = torch.randn(16, 256)

    def step() -> None:
        (x @ weight).square().sum().backward()
        weight.grad = None

    assert peak_growth(step) >= weight.nbytes


@pytest.mark.skipif(platform.system() != "Linux" or platform.libc_ver()[0] != "glibc", reason="needs /proc and glibc")
def test_agrees_with_resident_memory_in_a_fresh_process() -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(result.stdout)
    if found["resident"] is None:
        pytest.skip("this system does not let a process reset its resident high-water mark")
    assert found["counted"] > 20 * 2**20
    assert found["counted"] == pytest.approx(found["resident"], rel=TOLERANCE)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="not on meta"):
        peak_growth(lambda: None, "meta")
