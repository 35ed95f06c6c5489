"""The chart of quality against cost as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3bsr.cli.compare_runs import plot
from m3bsr.report.pareto import Point, save_pareto


@pytest.mark.parametrize("better", ["high", "low"])
def test_a_picture_with_every_run(tmp_path: Path, better: str) -> None:
    points = [Point("full", 4.5, 1.0), Point("bsr", 3.0, 0.9, 0.05, colour=1), Point("worse", 4.0, 0.5, colour=2)]
    path = tmp_path / "deep" / "chart.png"
    save_pareto(points, path, cost="GMACs", quality="delta_m, %", better=better)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # matplotlib's first three
        assert (pixels == colour).all(axis=1).any()


def test_one_run_is_no_chart(tmp_path: Path) -> None:
    rows = {"bsr": {"depth rmse": 1.0, "train_step_gmacs": 3.0}}
    with pytest.raises(ValueError, match="needs two runs"):
        plot(rows, tmp_path / "chart.png")
    plot({**rows, "full": {"depth rmse": 0.9, "train_step_gmacs": 4.0}}, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").is_file()
