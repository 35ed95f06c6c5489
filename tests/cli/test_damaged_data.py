"""``--data.on-error skip`` from the command line."""

from __future__ import annotations

import json
import shutil

import pytest

from m3bsr.cli import evaluate, train
from m3bsr.engine import read_log


@pytest.fixture
def damaged_root(data_root, tmp_path):
    """The pictures of the job with one training and one validation image cut off."""
    root = shutil.copytree(data_root, tmp_path / "damaged")
    for name in ("0001", "0005"):
        path = root / "images" / f"{name}.jpg"
        path.write_bytes(path.read_bytes()[:400])
    return root


def test_skip_replaces_counts_and_scores_what_is_whole(job, damaged_root, capsys):
    argv = [job.config, "--data.root", str(damaged_root)]
    assert train.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "0001.jpg" in error

    argv += ["--data.on-error", "skip", "--run.overwrite"]
    assert train.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "1 of 4 train samples are damaged, more than the share 0.01 (data.max_skipped)" in error
    assert "0001.jpg" in error

    assert train.main([*argv, "--data.max-skipped", "0.5"]) == 0
    result = json.loads((job.run / "result.json").read_text())
    assert result["num_damaged"] == {"train": 1, "val": 1}
    lines = [r for r in read_log(job.run / "log.jsonl") if r["kind"] == "damaged"]
    assert sorted(r["split"] for r in lines) == ["train", "val"] and "0001.jpg" in str(lines)

    capsys.readouterr()
    assert evaluate.main([str(job.run), "--root", str(damaged_root)]) == 0
    scored = json.loads((job.run / "metrics-last-network.json").read_text())
    assert scored["num_images"] == 2 and len(scored["damaged"]) == 1 and "0005.jpg" in scored["damaged"][0]
    assert scored["metrics"]["depth"] == pytest.approx(result["metrics"]["depth"], rel=1e-5)
    assert "left out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_met_a_damaged_sample_goes_on_with_skip(job, damaged_root, data_root):
    assert train.main([job.config, "--train.max-steps", "1"]) == 0
    resumed = [job.config, "--run.resume", "--data.root", str(damaged_root), "--data.on-error", "skip"]
    assert train.main([*resumed, "--data.max-skipped", "0.5"]) == 0
    assert json.loads((job.run / "result.json").read_text())["step"] == 4
