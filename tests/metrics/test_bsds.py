"""Edge scores against the benchmark's own C++ code: its numbers on generated pictures, and the code where installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2gray
from skimage.filters import gaussian, sobel
from skimage.io import imread

from m3bsr.cli import score_edges
from m3bsr.metrics.bsds import bsds_counts
from m3bsr.metrics.edges import COUNTS, EdgeCounts, EdgeScores, edge_counts

GOLDEN = Path(__file__).parents[1] / "golden" / "edges.npz"
NYUD = Path(__file__).parents[3] / "shared" / "data" / "NYUD_MT"
THRESHOLDS = np.arange(1, 100) / 100


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as stored:
        found = dict(stored)
    width = found["probability"].shape[-1]
    found["annotations"] = np.unpackbits(found["annotations"], axis=-1, count=width).astype(bool)
    return found


@pytest.fixture(scope="module", params=[1, 3], ids=["one annotator", "three annotators"])
def both(request, golden) -> tuple[np.ndarray, np.ndarray]:
    """Our counts ``[images, 4, T]`` and those of several runs of the benchmark ``[runs, images, 4, T]``."""
    people, max_dist = request.param, float(golden["max_dist"])
    pairs = zip(golden["probability"] / 255, golden["annotations"][:, :people], strict=True)
    return np.stack([edge_counts(p, drawn, THRESHOLDS, max_dist) for p, drawn in pairs]), golden[f"counts_{people}"]


def scores(pairs, max_dist, counter):
    metric = EdgeScores(max_dist=max_dist, counter=counter)
    for probability, drawn in pairs:
        metric.update_probability(probability, drawn.astype(float))
    return metric.compute()


def test_pixel_counts_are_those_of_the_benchmark(both):
    """An exact matching has at least as many pairs as the benchmark's, whose runs differ among themselves."""
    mine, runs = (dict(zip(COUNTS, np.moveaxis(counts, -2, 0), strict=True)) for counts in both)
    for name in ("predicted", "annotated"):
        assert (mine[name] == runs[name]).all()
    assert (mine["hit_annotated"] >= runs["hit_annotated"]).all()
    # About twice as far as the runs are apart, of up to 906 pixels of a prediction and 2,539 of three annotators.
    assert (mine["hit_annotated"] - runs["hit_annotated"].max(0)).max() <= 10
    assert abs(mine["hit_predicted"] - runs["hit_predicted"]).max() <= 16
    assert (mine["hit_annotated"] == runs["hit_annotated"].max(0)).mean() > 0.4


def test_scores_are_within_two_thousandths_of_the_benchmark(both):
    mine, runs = both
    nothing = [(np.zeros((1, 1)), np.zeros((1, 1, 1)))] * len(mine)

    def of(counts):
        left = iter(counts)
        return scores(nothing, 0.1, lambda *_: EdgeCounts(*next(left)))

    for run in runs:
        assert of(mine)["ods_f"] == pytest.approx(of(run)["ods_f"], abs=0.002)
        assert of(mine)["ois_f"] == pytest.approx(of(run)["ois_f"], abs=0.002)
        # One of the hundred recalls beyond the end of the curve is worth a hundredth of the precision there.
        assert of(mine)["ap"] == pytest.approx(of(run)["ap"], abs=0.0105)


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyEdgeEval._lib", None)
    for folder in ("predictions", "truth"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.eye(20, dtype=np.uint8) * 255).save(tmp_path / folder / "a.png")
    argv = [str(tmp_path / "predictions"), str(tmp_path / "truth"), "--num-workers", "1", "--bsds"]
    assert score_edges.main(argv) == 2
    assert "pip install 'm3bsr[bsds]'" in capsys.readouterr().err
    assert not (tmp_path / "predictions" / "edge-scores.json").exists()


def test_the_command_prints_both(tmp_path, capsys):
    pytest.importorskip("pyEdgeEval", reason="pyEdgeEval is not installed: pip install 'm3bsr[bsds]'")
    (tmp_path / "predictions").mkdir()
    for annotator in "ab":
        (tmp_path / "truth" / annotator).mkdir(parents=True)
    for seed in range(2):
        probability, drawn = score_edges.picture(2, seed, (40, 60))
        Image.fromarray((255 * probability).astype(np.uint8)).save(tmp_path / "predictions" / f"{seed}.png")
        for annotator, lines in zip("ab", drawn, strict=True):
            Image.fromarray(lines.astype(np.uint8) * 255).save(tmp_path / "truth" / annotator / f"{seed}.png")
    argv = [str(tmp_path / "predictions"), str(tmp_path / "truth"), "--max-dist", ".03", "--thresholds", "9"]
    assert score_edges.main([*argv, "--num-workers", "1", "--bsds"]) == 0
    out = capsys.readouterr().out
    assert "benchmark's code" in out and "difference" in out
    report = json.loads((tmp_path / "predictions" / "edge-scores.json").read_text())
    for name in ("ods_f", "ois_f"):
        assert report["metrics"][name] == pytest.approx(report["metrics_bsds"][name], abs=0.01)
    assert report["metrics_bsds"]["ods_f"] > 0.5


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not NYUD.is_dir(), reason="no real NYUD frames beside the repository")
@pytest.mark.parametrize("people", [1, 3])
def test_on_real_frames_the_benchmarks_code_gives_the_same_scores(people):
    """Gradients of two frames against label boundaries, and depth steps and coarser labels as other annotators."""
    pytest.importorskip("pyEdgeEval", reason="pyEdgeEval is not installed: pip install 'm3bsr[bsds]'")
    pairs = []
    for name in (NYUD / "gt_sets" / "val.txt").read_text().split()[:2]:
        strength = sobel(gaussian(rgb2gray(imread(NYUD / "images" / f"{name}.jpg")), 1.5))
        depth = np.load(NYUD / "depth" / f"{name}.npy").squeeze()
        labels = imread(NYUD / "segmentation" / f"{name}.png").astype(float)
        drawn = [np.load(NYUD / "edge" / f"{name}.npy").squeeze() > 0, steps(depth, 0.2), steps(labels // 4, 0.5)]
        pairs.append((np.floor(255 * np.clip(strength / np.percentile(strength, 99.5), 0, 1)) / 255, np.stack(drawn)))
    pairs = [(probability, drawn[:people]) for probability, drawn in pairs]
    mine, theirs = (scores(pairs, 0.011, counter) for counter in (edge_counts, bsds_counts))
    for name in ("ods_f", "ois_f", "ap"):
        assert mine[name] == pytest.approx(theirs[name], abs=0.002), name


def steps(values: np.ndarray, least: float) -> np.ndarray:
    """Pixels that differ from the one above or to the left by more than ``least``."""
    found = np.zeros(values.shape, bool)
    found[1:] |= abs(np.diff(values, axis=0)) > least
    found[:, 1:] |= abs(np.diff(values, axis=1)) > least
    return found
