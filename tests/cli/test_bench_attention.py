"""The bench of the two forms of attention runs, and both are the same function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from m3bsr.bsr import attention
from m3bsr.bsr.attention import explicit_attention
from m3bsr.cli.bench_attention import main


@pytest.mark.parametrize("emulated", [False, True])
def test_prints_a_ratio_for_every_length_and_type(capsys, monkeypatch, emulated):
    monkeypatch.setattr(attention, "cpu_emulates_bf16", lambda: emulated)
    assert main(["--tokens", "5", "600", "--batch-size", "1", "--heads", "2", "--rounds", "2", "--device", "cpu"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["5", "fp32"], ["600", "fp32"], ["5", "bf16"], ["600", "bf16"]]
    assert [row[4] for row in rows] == ["fused", "fused", "fused" if emulated else "explicit", "fused"]
    assert all(float(value) > 0 for row in rows for value in row[2:4])


def test_both_forms_are_one_function():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    torch.testing.assert_close(explicit_attention(q, k, v, 8**-0.5), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("option", [["--tokens", "0"], ["--rounds", "-1"]])
def test_numbers_must_be_positive(option, capsys):
    assert main(option) == 2
    assert "must be positive" in capsys.readouterr().err
