"""The table of several processes says whether they trained the same, and how fast."""

from __future__ import annotations

import pytest
import torch

from m3bsr.cli.scale import Job, main, table

JOB = Job((1, 2), 2, 6, 2, "ddp", "fp32", "cpu", "", ())


def run(step_s, shift=0.0):
    weights = {"a": torch.tensor([1.0, 2.0]) + shift}
    return {"step_s": step_s, "start": {"a": torch.tensor([1.0, 1.0])}, "weights": weights}


def test_ratios_are_taken_within_a_round():
    lines, is_equal = table(JOB, {1: run([1.0, 4.0]), 2: run([0.5, 2.0], 1e-5)})
    assert is_equal and lines[-1] == "equal"
    assert lines[-2].split() == ["2", "5.00", "2.00", "1.00e-05", "1.0e-05"]


@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_other_weights_are_said(shift):
    lines, is_equal = table(JOB, {1: run([1.0, 1.0]), 2: run([1.0, 1.0], shift)})
    assert not is_equal and lines[-1].startswith("NOT equal")


@pytest.mark.parametrize("argv", [["--processes", "0"], ["--steps", "1"], ["--processes", "2", "3"]])
def test_numbers_that_make_no_sense(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("error: --processes")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "experts"])
def test_two_processes(parallel, capsys):
    assert main(["--processes", "2", "--rounds", "1", "--steps", "2", "--batch-size", "1", "--parallel", parallel]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal"
