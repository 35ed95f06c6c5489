"""Annotations of boundaries: one folder, a folder for each annotator, BSDS files; and scores from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from m3bsr.cli import score_edges
from m3bsr.data.boundaries import read_boundaries, truth_files
from m3bsr.metrics.edges import EdgeScores

SIZE = (30, 40)


@pytest.fixture
def drawn() -> np.ndarray:
    """Two annotators of two images: lines, of which the second annotator drew one less."""
    drawn = np.zeros((2, 2, *SIZE), np.uint8)
    drawn[:, :, 8, 5:35] = drawn[:, 0, 20, 5:35] = 1
    return drawn


@pytest.fixture
def predictions(tmp_path) -> Path:
    folder = tmp_path / "edge"
    folder.mkdir()
    for i in range(2):
        picture = np.zeros(SIZE, np.uint8)
        picture[8 + i, 5:35], picture[25, 5:35] = 255, 100
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def test_what_file_managers_leave_behind_is_no_annotator(tmp_path, drawn):
    truth = write(tmp_path / "truth", drawn, "folders")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (truth / name).mkdir()
    (truth / "a0" / "._0.png").touch()
    files = truth_files(truth)
    assert list(files) == ["0", "1"] and [path.parent.name for path in files["0"]] == ["a0", "a1"]


def write(root: Path, drawn: np.ndarray, form: str) -> Path:
    for i, image in enumerate(drawn):
        if form == "mat":
            cells = np.empty((1, len(image)), object)
            for k, boundaries in enumerate(image):
                cells[0, k] = {"Segmentation": boundaries, "Boundaries": boundaries}
            root.mkdir(exist_ok=True)
            savemat(root / f"{i}.mat", {"groundTruth": cells})
        else:
            for k, boundaries in enumerate(image):
                (root / f"a{k}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(255 * boundaries).save(root / f"a{k}" / f"{i}.png")
    return root


@pytest.mark.parametrize("form", ["mat", "folders"])
def test_both_forms_are_read_and_scored(tmp_path, drawn, predictions, capsys, form):
    truth = write(tmp_path / "truth", drawn, form)
    files = truth_files(truth)
    assert list(files) == ["0", "1"]
    assert torch.equal(read_boundaries(files["1"]), torch.from_numpy(drawn[1]).float())
    argv = [str(predictions), str(truth), "--max-dist", "0.03", "--thresholds", "9", "--num-workers", "1"]
    assert score_edges.main(argv) == 0
    assert "2 images, 4 annotations" in (out := capsys.readouterr().out) and "[max_dist 0.03, 9 thresholds]" in out
    metric = EdgeScores(max_dist=0.03, thresholds=9)
    for i in range(2):
        metric.update_probability(np.asarray(Image.open(predictions / f"{i}.png")) / 255, drawn[i].astype(float))
    assert json.loads((predictions / "edge-scores.json").read_text())["metrics"] == metric.compute()


def test_what_is_missing_is_a_line(tmp_path, drawn, predictions, capsys):
    truth = write(tmp_path / "truth", drawn, "folders")
    (truth / "a1" / "0.png").unlink()
    (predictions / "1.png").unlink()
    assert score_edges.main([str(predictions), str(truth)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: missing annotator: {truth / 'a1' / '0.png'}",
        f"error: missing file: {predictions / '1.png'}",
        "error: 2 images cannot be scored; the first are above",
    ]
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(truth / "a1" / "0.png")
    with pytest.raises(ValueError, match="0.png is 9x9 pixels, another annotation of the image 30x40"):
        read_boundaries(truth_files(truth)["0"])


def test_faulty_folders_and_files(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no such folder of annotations"):
        truth_files(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no annotation"):
        truth_files(tmp_path)
    for content in ({"groundTruth": np.empty((1, 0), object)}, {"groundTruth": np.zeros((1, 2))}):
        savemat(tmp_path / "x.mat", content)
        with pytest.raises(ValueError, match=r"x\.mat"):
            read_boundaries([tmp_path / "x.mat"])
    assert score_edges.main([]) == 2 and "or --bench" in capsys.readouterr().err


def test_predictions_of_zeros_and_ones_are_an_error(tmp_path, drawn, predictions, capsys):
    truth = write(tmp_path / "truth", drawn, "folders")
    for path in predictions.glob("*.png"):
        Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8)).save(path)
    assert score_edges.main([str(predictions), str(truth), "--num-workers", "1"]) == 2
    assert f"{predictions}: no pixel is brighter than 1" in capsys.readouterr().err
    assert not (predictions / "edge-scores.json").exists()


def test_the_speed_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(score_edges, "BSDS_SIZE", (40, 60))
    assert score_edges.main(["--bench", "--thresholds", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].startswith("1 annotator, 9 thresholds, 40x60: ") and "images a second and core; thinning" in lines[1]
    )
