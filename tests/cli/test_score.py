"""Predictions saved by evaluation and scored from disk: the same numbers, and every faulty file by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3bsr.cli import evaluate, score, train

CONFIG = """
from m3bsr.config import Config, DataConfig, ModelConfig, OptimConfig, Plan, RunConfig, TrainConfig

config = Config(
    data=DataConfig(name="nyud", root={root!r}, tasks=("semseg", "depth", "normals", "edge"), image_size=(32, 48),
                    num_workers=0),
    model=ModelConfig(backbone="test_vit", head_dim=8),
    bsr=Plan(train_blocks=(3, 5)),
    train=TrainConfig(epochs=1, batch_size=2, eval_batch_size=2, eval_every=0),
    optim=OptimConfig(lr=1e-3),
    run=RunConfig(dir={run!r}, device="cpu"),
)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two training and three validation pictures of 40x56 with four labels."""
    root, rng = tmp_path_factory.mktemp("NYUD_MT"), np.random.default_rng(0)
    for folder in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (root / folder).mkdir()
    for i in range(5):
        normals = rng.normal(size=(40, 56, 3)).astype(np.float32)
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(root / "images" / f"{i}.jpg")
        Image.fromarray(rng.integers(0, 41, (40, 56), dtype=np.uint8)).save(root / "segmentation" / f"{i}.png")
        np.save(root / "depth" / f"{i}.npy", rng.uniform(1, 4, (40, 56)).astype(np.float32))
        np.save(root / "normals" / f"{i}.npy", normals / np.linalg.norm(normals, axis=-1, keepdims=True))
        np.save(root / "edge" / f"{i}.npy", (rng.random((40, 56)) > 0.9).astype(np.float32))
    (root / "gt_sets" / "train.txt").write_text("0\n1\n")
    (root / "gt_sets" / "val.txt").write_text("2\n3\n4\n")
    return root


@pytest.fixture(scope="module")
def run(root, tmp_path_factory) -> Path:
    """A trained run of one step."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "job.py").write_text(CONFIG.format(root=str(root), run=str(folder / "run")))
    assert train.main([str(folder / "job.py")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "out"
    assert evaluate.main([str(run), "--protocol", "original", "--save-predictions", str(out)]) == 0
    return out


@pytest.fixture
def saved(evaluated, tmp_path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "out"))


def close(found, expected) -> None:
    """Equal for classes and metres; unit vectors are rounded to float32, edges to 8 bits."""
    assert found["semseg"] == expected["semseg"] and found["depth"] == pytest.approx(expected["depth"], rel=1e-12)
    assert found["normals"] == pytest.approx(expected["normals"], rel=1e-4)
    # 1 / 255 of a probability moves pixels over at most one of the 99 thresholds.
    assert found["edge"]["ods_f"] == pytest.approx(expected["edge"]["ods_f"], abs=0.02)


@pytest.mark.parametrize(
    ("protocol", "flip", "size"),
    [("network", False, (32, 48)), ("resized:24x36", True, (24, 36))],
)
def test_scores_from_disk_equal_those_of_the_evaluation(run, root, tmp_path, capsys, protocol, flip, size) -> None:
    out, name = tmp_path / "out", protocol.replace(":", "-")
    argv = [str(run), "--protocol", protocol, "--save-predictions", str(out), *(["--flip"] if flip else [])]
    assert evaluate.main(argv) == 0
    printed = capsys.readouterr().out
    shown = {"network": "[network 32x48]"}.get(protocol, f"[{protocol}, flip]")
    assert printed.count(shown) == 4
    report = json.loads((run / f"metrics-last-{name}{'-flip' if flip else ''}.json").read_text())
    assert report["protocol"] == protocol and report["flip"] == flip
    with Image.open(out / "semseg" / "2.png") as picture:
        assert picture.mode == "L" and picture.size == size[::-1]
    assert np.load(out / "normals" / "2.npy").shape == (*size, 3) and np.load(out / "depth" / "2.npy").shape == size
    assert score.main([str(out), "--data.root", str(root), "--num-workers", "1"]) == 0
    as_scored = protocol if protocol != "network" else "resized:32x48"
    assert capsys.readouterr().out.count(f"[{as_scored}{', flip' if flip else ''}]") == 4
    scores = json.loads((out / f"scores-{as_scored.replace(':', '-')}.json").read_text())
    close(scores["metrics"], report["metrics"])
    assert not out.with_name("out.writing").exists()


def test_only_the_tasks_asked_for(run, root, tmp_path) -> None:
    out = tmp_path / "out"
    assert evaluate.main([str(run), "--tasks", "depth", "--save-predictions", str(out), "--max-val", "2"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["depth", "predictions.json"]
    assert score.main([str(out), "--data.root", str(root)]) == 0
    scores = json.loads((out / "scores-resized-32x48.json").read_text())
    assert list(scores["metrics"]) == ["depth"] and scores["num_images"] == 2


def test_predictions_of_another_program(run, root, saved, tmp_path, capsys) -> None:
    """Its files alone: depth from MATLAB, normals as a picture; no predictions.json, so data and protocol are said."""
    from scipy.io import savemat

    other = tmp_path / "other"
    shutil.copytree(saved, other)
    (other / "predictions.json").unlink()
    for path in (other / "depth").glob("*.npy"):
        savemat(path.with_suffix(".mat"), {"depth": np.load(path)})
        path.unlink()
    for path in (other / "normals").glob("*.npy"):
        Image.fromarray(np.round((np.load(path) + 1) / 2 * 255).astype(np.uint8)).save(path.with_suffix(".png"))
        path.unlink()
    assert score.main([str(other), "--data.root", str(root), "--data.name", "nyud", "--num-workers", "1"]) == 0
    found = json.loads((other / "scores-original.json").read_text())["metrics"]
    assert score.main([str(saved), "--data.root", str(root), "--num-workers", "1"]) == 0
    expected = json.loads((saved / "scores-original.json").read_text())["metrics"]
    assert found["depth"] == expected["depth"] and found["edge"] == expected["edge"]
    assert found["normals"]["mean"] == pytest.approx(expected["normals"]["mean"], rel=0.01)


def test_predictions_of_the_size_before_padding_are_scored_in_place(root, tmp_path, capsys) -> None:
    """NYUDv2 is padded when read, from 40x56 to 64x64; others save predictions as large as its files."""
    v2, out = tmp_path / "NYUDv2", tmp_path / "out"
    shutil.copytree(root, v2)
    for path in (v2 / "images").glob("*.jpg"):
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    shutil.copytree(root / "depth", out / "depth")
    (out / "sal").mkdir()
    assert score.main([str(out), "--data.root", str(v2)]) == 0
    assert "not scored: sal, no task of nyud" in capsys.readouterr().err
    perfect = json.loads((out / "scores-original.json").read_text())["metrics"]["depth"]
    assert perfect["rmse"] == 0 and perfect["delta1"] == 1
    assert score.main([str(out), "--data.root", str(v2), "--protocol", "resized:40x56"]) == 2
    assert "resized:40x56 is the size of the files" in capsys.readouterr().err
    np.save(out / "depth" / "2.npy", np.ones((20, 30), np.float32))
    assert score.main([str(out), "--data.root", str(v2)]) == 2
    assert "20x30 pixels, its label 64x64, 40x56 before it was padded" in capsys.readouterr().err


def test_every_faulty_file_is_a_line(root, saved, capsys) -> None:
    (saved / "depth" / "2.npy").unlink()
    np.save(saved / "depth" / "3.npy", np.zeros((20, 30), np.float32))
    np.save(saved / "depth" / "4.npy", np.full((40, 56), np.nan, np.float32))
    Image.fromarray(np.full((40, 56), 40, np.uint8)).save(saved / "semseg" / "2.png")
    (saved / "edge" / "2.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert score.main([str(saved), "--data.root", str(root), "--num-workers", "1"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (
        lines[0] == f"error: {saved / 'semseg' / '2.png'}: predicted class out of range: found 40..40, expected 0..39"
    )
    assert lines[1] == f"error: missing file: {saved / 'depth' / '2.npy'}"
    assert lines[2].startswith(f"error: cannot read image {saved / 'edge' / '2.png'}")
    assert lines[3] == f"error: {saved / 'depth' / '3.npy'} is 20x30 pixels, its label 40x56 (protocol original)"
    assert lines[4] == f"error: {saved / 'depth' / '4.npy'}: holds NaN or infinity"
    assert lines[5] == f"error: 5 predictions of {saved} cannot be scored" and len(lines) == 6


def test_probabilities_saved_as_zeros_and_ones_are_not_scored_as_nothing(root, saved, capsys) -> None:
    for path in (saved / "edge").glob("*.png"):
        with Image.open(path) as picture:
            drawn = np.asarray(picture) > 127
        Image.fromarray(drawn.astype(np.uint8)).save(path)
    drawn[0, 0] = True
    Image.fromarray(drawn.astype(np.uint8)).save(path)
    capsys.readouterr()
    argv = [str(saved), "--data.root", str(root), "--num-workers", "1", "--data.tasks", "semseg", "edge"]
    assert score.main(argv) == 2
    assert f"error: {saved / 'edge'}: no pixel is brighter than 1; probabilities are saved as 255 p" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--protocol", "resized:0x9"], "--protocol must be network, original or resized:HxW"),
        (["--data.tasks", "saliency"], "saliency"),
        (["--data.root", "no/where"], "no/where"),
        (["--data.val-split", "test"], "test.txt"),
    ],
)
def test_wrong_arguments(root, saved, capsys, change, says) -> None:
    capsys.readouterr()
    assert score.main([str(saved), "--data.root", str(root), *change]) == 2
    assert says in capsys.readouterr().err


def test_nothing_is_overwritten_and_a_folder_without_tasks_is_named(run, root, saved, tmp_path, capsys) -> None:
    assert evaluate.main([str(run), "--save-predictions", str(saved)]) == 2
    assert f"{saved} exists already" in capsys.readouterr().err
    assert evaluate.main([str(run), "--protocol", "full"]) == 2
    assert "--protocol must be network, original or resized:HxW" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert score.main([str(tmp_path / "empty"), "--data.root", str(root)]) == 2
    assert "has no folder of a task of nyud" in capsys.readouterr().err
    assert score.main([str(tmp_path / "none"), "--data.root", str(root)]) == 2
    assert "no such folder of predictions" in capsys.readouterr().err
