"""The commands predict, report and measure_cost on a run that was never trained, at tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3bsr.build import build_model, build_tasks
from m3bsr.cli import measure_cost, predict, report
from m3bsr.config import Config, replace
from m3bsr.engine import save_checkpoint
from m3bsr.engine.evaluate import Metrics

TINY = {
    "data.tasks": ("semseg", "depth", "normals", "edge"),
    "data.image_size": (48, 64),
    "model.backbone": "m3vit_tiny_patch16",
    "model.head_dim": 16,
    "moe.num_experts": 4,
    "moe.top_k": 2,
    "moe.blocks": (7, 11),
    "bsr.train_blocks": (7, 11),
    "bsr.drop_blocks": (5,),
    "bsr.keep_rate": 0.5,
    "train.batch_size": 2,
    "loss.stride": 2,
}
CONFIG_FILE = f"""
from m3bsr.config import Config, replace
config = replace(Config(), {TINY!r})
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run folder with a checkpoint of random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = replace(Config(), TINY)
    save_checkpoint(
        folder / "checkpoints" / "last", model=build_model(config), config=config.to_dict(), progress={"step": 1}
    )
    (folder / "config.json").write_text(config.to_json())
    return folder


def write_photo(path: Path, size: tuple[int, int] = (90, 60), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_photos_of_any_size_and_kind(run_dir, tmp_path, capsys) -> None:
    photos = [
        write_photo(tmp_path / "wide.jpg", (211, 60)),
        write_photo(tmp_path / "other" / "wide.png", (30, 45)),
    ]
    Image.new("L", (17, 64), 128).save(tmp_path / "grey.png")
    out = tmp_path / "out"
    arguments = [str(run_dir), *map(str, photos), str(tmp_path / "grey.png"), "--out", str(out), "--tasks", "depth"]
    assert predict.main(arguments) == 0
    written = capsys.readouterr().out.split()
    assert [Path(p).name for p in written] == ["wide.png", "wide-2.png", "grey.png"]
    for path in written:
        with Image.open(path) as image:
            image.verify()


def test_predictions_have_the_photos_shape(run_dir, tmp_path) -> None:
    config, model, _ = predict.open_run(run_dir)
    sample = predict.predict(model, build_tasks(config), config, write_photo(tmp_path / "a.jpg", (2100, 600)))
    assert sample.photo.shape == (293, 1024, 3)  # at most 1024 pixels a side
    assert {picture.shape for picture in sample.predictions.values()} == {(293, 1024, 3)}
    assert set(sample.predictions) == {"semseg", "depth", "normals", "edge"}
    assert sample.grid == (3, 4)
    assert [(b, int(m.sum())) for b, m in sample.kept["depth"]] == [(5, 6)]
    assert set(sample.experts["edge"]) == {7, 11}


def test_a_photo_is_turned_as_its_camera_says(tmp_path) -> None:
    exif = Image.Exif()
    exif[predict.EXIF_ORIENTATION] = 6
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = 255  # the left half is bright; turned clockwise it is the upper one
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    photo = predict.upright(tmp_path / "turned.jpg")
    assert photo.shape == (80, 40, 3)
    assert photo[:38].min() > 200 and photo[42:].max() < 50


def test_only_some_tasks(run_dir, tmp_path, capsys) -> None:
    photo = write_photo(tmp_path / "a.png")
    assert predict.main([str(run_dir), str(photo), "--tasks", "depth", "--out", str(tmp_path)]) == 0
    assert predict.main([str(run_dir), str(photo), "--tasks", "dept"]) == 2
    assert "did you mean 'depth'?" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["missing", "text", "truncated", "empty", "no run"])
def test_faults_are_one_line_that_names_the_file(run_dir, tmp_path, capsys, fault: str) -> None:
    photo, run = write_photo(tmp_path / "photo.jpg"), run_dir
    if fault == "missing":
        photo = tmp_path / "nowhere.jpg"
    elif fault == "text":
        photo.write_text("no picture at all")
    elif fault == "truncated":
        photo.write_bytes(photo.read_bytes()[:-900])
    elif fault == "empty":
        photo.write_bytes(b"")
    else:
        run = tmp_path / "norun"
    assert predict.main([str(run), str(photo)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(run if fault == "no run" else photo) in error
    assert not (run_dir / "predictions").exists()


def test_report_of_a_run_without_data(run_dir, capsys) -> None:
    assert report.main([str(run_dir), "--pictures", "0"]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == run_dir / "report.html" and "m3vit_tiny_patch16" in page.read_text()
    assert report.main([str(run_dir), "--checkpoint", "last", "--root", "/nowhere"]) == 2
    assert "data.root" in capsys.readouterr().err


def test_measuring_cost_leaves_the_weights_alone(run_dir) -> None:
    config, model, _ = predict.open_run(run_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    cost = report.write_cost(run_dir, config, model, repeats=1)
    assert json.loads((run_dir / "cost.json").read_text()) == json.loads(json.dumps(cost))
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_cost_of_a_config(tmp_path, capsys) -> None:
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG_FILE)
    assert measure_cost.main([str(path), "--json", "--repeats", "1"]) == 0
    frozen = json.loads(capsys.readouterr().out)
    keys = "trainable_params total_params forward_gmacs train_step_gmacs saved_bytes_per_sample state_bytes"
    assert set(keys.split()) | {"measured_peak_bytes", "step_ms"} <= set(frozen)
    own = ["--bsr.train-blocks", "all", "--bsr.score-source", "own"]  # no frozen block is left to score
    assert measure_cost.main([str(path), "--json", "--repeats", "1", *own]) == 0
    full = json.loads(capsys.readouterr().out)
    assert full["trainable_params"] == full["total_params"] == frozen["total_params"]
    assert full["forward_gmacs"] == pytest.approx(frozen["forward_gmacs"], rel=0.02)
    for key in ("train_step_gmacs", "saved_bytes_per_sample", "state_bytes", "measured_peak_bytes"):
        assert frozen[key] < full[key]
    # Nothing before the first trained block has a backward pass.
    assert all(frozen["gmacs_by_module"][f"backbone.blocks.{i}"][1] == 0 for i in range(7))
    assert measure_cost.main([str(path), "--repeats", "0"]) == 2
    assert "--repeats" in capsys.readouterr().err


def test_every_head_is_a_line_of_the_cost_table(tmp_path, capsys) -> None:
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG_FILE)
    assert measure_cost.main([str(path), "--repeats", "1", "--data.tasks", "semseg", "normals"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if line.startswith("heads")] == [
        "heads.semseg",
        "heads.normals",
    ]
    assert "measured peak" in text


def test_pictures_for_the_log() -> None:
    class Rooms:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict:
            labels = {"semseg": torch.zeros(1, 48, 64, dtype=torch.int64), "depth": torch.ones(1, 48, 64)}
            return {"image": torch.zeros(3, 48, 64), "name": str(index), **labels}

    config = replace(Config(), {**TINY, "data.tasks": ("semseg", "depth")})
    model = build_model(config)
    counts = {3: {"semseg": torch.tensor([4, 0]), "depth": torch.tensor([2, 2])}}
    metrics = Metrics({}, "network", 3, counts)
    pictures = report.make_reporter(build_tasks(config), Rooms(), 2)(model, metrics)
    heat_maps = {tag: pictures.pop(tag) for tag in list(pictures) if tag.startswith("routing/")}
    assert {tag: p.shape for tag, p in heat_maps.items()} == {
        "routing/load/block 3": (32, 32, 3),
        "routing/overlap/block 3": (32, 32, 3),
    }
    assert set(pictures) == {"semseg/0", "semseg/2", "depth/0", "depth/2"}
    assert pictures["depth/2"].shape == (48, 128, 3)  # ground truth and prediction side by side
