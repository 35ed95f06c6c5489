"""A folder of predictions is whole or not there; what is read back is what was written."""

from __future__ import annotations

import pytest
import torch

from m3bsr.engine.predictions import PredictionWriter, read_about, read_saved, saved_file
from m3bsr.tasks import TASKS


@pytest.mark.parametrize("name", [name for name, kind in TASKS.items() if kind.dense])
def test_written_predictions_are_read_back(tmp_path, name):
    torch.manual_seed(0)
    task = TASKS[name]()
    prediction = torch.randn(2, task.num_channels, 9, 7)
    writer = PredictionWriter(tmp_path / "out", {name: task})
    writer.add(name, task, prediction, ["a", "b"])
    assert not (tmp_path / "out").exists(), "an interrupted evaluation must leave no half folder"
    writer.finish({"protocol": "original"})
    assert read_about(tmp_path / "out") == {"protocol": "original"}
    for image, expected in zip("ab", task.to_saved(prediction), strict=True):
        path = saved_file(tmp_path / "out", name, task.saved_suffixes, image)
        assert path.suffix == task.saved_suffixes[0] and torch.equal(read_saved(task, path), expected)
    with pytest.raises(ValueError, match="exists already"):
        PredictionWriter(tmp_path / "out", {name: task})


def test_what_an_interrupted_evaluation_left_is_replaced_and_an_empty_folder_used(tmp_path):
    task = TASKS["depth"]()
    (tmp_path / "out").mkdir()
    PredictionWriter(tmp_path / "out", {"depth": task}).add("depth", task, torch.zeros(1, 1, 2, 2), ["old"])
    writer = PredictionWriter(tmp_path / "out", {"depth": task})
    writer.add("depth", task, torch.zeros(1, 1, 2, 2), ["new"])
    writer.finish({})
    assert [path.name for path in (tmp_path / "out" / "depth").iterdir()] == ["new.npy"]
    assert not (tmp_path / "out.writing").exists()


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="classification has one per image"):
        PredictionWriter(tmp_path / "out", {"classification": TASKS["classification"]()})
    (tmp_path / "predictions.json").write_text("{")
    with pytest.raises(ValueError, match=r"predictions\.json is no JSON file"):
        read_about(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing file: .*depth/a\.npy"):
        read_saved(TASKS["depth"](), saved_file(tmp_path, "depth", (".npy", ".mat"), "a"))
