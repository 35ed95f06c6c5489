"""The bench of a step: chosen rows, one of them behind a prefix that is read from files."""

from __future__ import annotations

import pytest

from m3bsr.cli.bench import main


@pytest.mark.slow
def test_a_kept_prefix_saves_its_forward_work_and_stores_as_much(capsys):
    names = ["bsr .5", "bsr .5, prefix kept"]
    one = ["--models", "deit_small_patch16_224", "--batch-size", "1", "--rounds", "1", "--clock", "cpu"]
    assert main([*one, "--rows", *names]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bsr")]
    plain, kept = ([float(number) for number in line[24:].split()] for line in lines)
    assert plain[0] == kept[0] and 0.6 < kept[4] < 0.8  # a third of the step is the forward pass of the prefix
