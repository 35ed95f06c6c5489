"""The bench of the loader runs on a config, and its verdict says what limits loading."""

from __future__ import annotations

import re

import pytest

from m3bsr.cli.bench_loader import main, verdict
from m3bsr.config import Config, replace

PARTS = {"whole": 95.0, "read normals": 50.0, "transform": 30.0, "collate": 5.0}


def test_says_what_a_sample_costs_and_how_long_steps_wait(job, capsys):
    assert main([job.config, "--steps", "2", "--samples", "2", "--step-ms", "5", "--data.num-workers", "1"]) == 0
    out = capsys.readouterr().out
    for part in ("read image", "read semseg", "read depth", "transform", "collate", "together"):
        assert re.search(rf"^  {part} +\d+\.\d\d ms$", out, re.MULTILINE), part
    assert re.search(r"1 workers on \d+ cores can load [\d.]+ samples a second", out)
    assert re.search(r"steps of \d+ ms: waited [\d.]+% of the time \(aim: under 2%\)", out)


@pytest.mark.slow
def test_real_steps(job, capsys):
    assert main([job.config, "--steps", "1", "--samples", "1"]) == 0
    assert "waited" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("workers", "wait_ms", "busy_ms", "step_ms", "limit"),
    [
        (2, 5.0, 5.0, 1000.0, None),  # 16 samples of 100 ms on two cores: 800 ms
        (2, 500.0, 20.0, 300.0, "processor time of the workers, of which 'read normals' takes most"),
        (2, 500.0, 20.0, 1000.0, "other work on the cores, or a disk"),
        (2, 37.0, 35.0, 1000.0, "the training process, which takes batches over"),
        (0, 1600.0, 1600.0, 1000.0, "loaded in the training process"),
    ],
)
def test_verdict(monkeypatch, workers, wait_ms, busy_ms, step_ms, limit):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    config = replace(Config(), {"data.num_workers": workers, "train.batch_size": 8, "train.accumulate": 2})
    text = verdict(PARTS, config, wait_ms, step_ms, busy_ms)
    assert f"steps (16 samples) of {1600 if workers == 0 else 800} ms and more" in text
    assert ("what limits it" in text) == (limit is not None) and (limit is None or limit in text)
