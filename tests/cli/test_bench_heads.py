"""The bench of heads at toy size: a row for each head and stride, costs that are those of the heads."""

from __future__ import annotations

import re

from m3bsr.cli.bench_heads import main

TINY = ["--size", "32x48", "--batch-size", "1", "--rounds", "1", "--device", "cpu", "--clock", "cpu"]


def test_a_row_for_each_head_and_stride(capsys) -> None:
    heads = ["light", "multilevel", "light+refine"]
    assert main([*TINY, "--heads", *heads, "--strides", "1", "4", "--train-blocks", "11"]) == 0
    title, _, alone, *lines = capsys.readouterr().out.splitlines()
    assert "semseg and depth, batch 1, fp32, blocks [11] trained" in title and alone.startswith("backbone alone")
    rows = {
        (m[1], int(m[2])): list(map(float, m[3].split()))
        for m in (re.match(r"(\S+), stride (\d) (.*)", line) for line in lines)
    }
    assert list(rows) == [(head, stride) for head in heads for stride in (1, 4)]
    params = {head: rows[head, 1][0] for head in heads}
    assert params["light"] == 127 and params["light"] < params["light+refine"] < params["multilevel"]
    assert all(step > 0 and of_backbone > 0 and share < 1 for _, _, step, of_backbone, share in rows.values())


def test_errors_are_one_line(capsys) -> None:
    for options, message in (
        (["--size", "big"], "--size must be height x width"),
        (["--strides", "0"], "must be positive"),
        (["--heads", "lite"], "did you mean 'light'"),
    ):
        assert main([*TINY, *options]) == 2
        assert message in capsys.readouterr().err
