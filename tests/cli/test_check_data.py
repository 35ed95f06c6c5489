"""Planted damage: every fault is listed once, whatever the number of processes, and the exit code says so."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from m3bsr.cli import check_data

H, W = 12, 20


@pytest.fixture
def nyud(tmp_path):
    """Six training and two validation frames without a fault."""
    root, rng = tmp_path / "NYUD_MT", np.random.default_rng(0)
    for folder in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (root / folder).mkdir(parents=True)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (H, W, 3), np.uint8)).save(root / "images" / f"{i}.jpg")
        Image.fromarray(rng.integers(0, 41, (H, W), np.uint8)).save(root / "segmentation" / f"{i}.png")
        np.save(root / "depth" / f"{i}.npy", rng.uniform(1, 9, (H, W)))
        np.save(root / "normals" / f"{i}.npy", np.full((H, W, 3), (0, 0, -1.0)))
        np.save(root / "edge" / f"{i}.npy", np.eye(H, W))
    (root / "gt_sets" / "train.txt").write_text("0\n1\n2\n3\n4\n5\n")
    (root / "gt_sets" / "val.txt").write_text("6\n7\n")
    return root


def _run(capsys, *arguments) -> tuple[int, str]:
    code = check_data.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


def _halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_whole_set_has_nothing_wrong(nyud, capsys):
    code, out = _run(capsys, nyud, "--workers", 0)
    assert code == 0
    assert out.splitlines() == [
        f"{nyud}: nyud, semseg, depth, normals, edge",
        "train: 6 samples, nothing wrong",
        "val: 2 samples, nothing wrong",
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_planted_fault_is_listed_once(nyud, capsys, workers):
    (nyud / "images" / "0.jpg").unlink()
    _halve(nyud / "images" / "1.jpg")
    _halve(nyud / "depth" / "1.npy")
    (nyud / "edge" / "2.npy").unlink()
    np.save(nyud / "normals" / "2.npy", np.full((H + 2, W, 3), (0, 0, -1.0)))
    Image.fromarray(np.full((H, W), 41, np.uint8)).save(nyud / "segmentation" / "3.png")
    np.save(nyud / "depth" / "4.npy", np.full((H, W), 2500.0))
    (nyud / "segmentation" / "7.png").write_bytes(b"")
    code, out = _run(capsys, nyud, "--workers", workers)
    assert code == 1
    expected = [
        ("missing file", "images/0.jpg"),
        ("cannot read image", "images/1.jpg"),
        ("cannot read array", "depth/1.npy"),
        ("14x20 pixels, its image", "normals/2.npy"),
        ("missing file", "edge/2.npy"),
        ("label 41 is out of range", "segmentation/3.png"),
        ("depth 2500 is out of range", "depth/4.npy"),
        ("cannot read image", "segmentation/7.png"),
    ]
    faults = [line for line in out.splitlines() if line.startswith("  ")]
    assert len(faults) == len(expected), out
    for line, (what, where) in zip(faults, expected, strict=True):
        assert what in line and str(nyud / where) in line
    assert "train: 6 samples, 7 faults" in out and "val: 2 samples, 1 fault" in out.splitlines()


def test_only_the_tasks_and_splits_asked_for(nyud, capsys):
    (nyud / "edge" / "2.npy").unlink()
    _halve(nyud / "depth" / "7.npy")
    assert _run(capsys, nyud, "--tasks", "depth", "--splits", "train", "--workers", 0)[0] == 0
    assert _run(capsys, nyud, "--tasks", "depth", "--workers", 0)[0] == 1
    assert _run(capsys, nyud, "--tasks", "edge", "--splits", "val", "--workers", 0)[0] == 0


def test_faults_of_a_split_file_and_samples_in_both_splits(nyud, capsys):
    (nyud / "gt_sets" / "train.txt").write_text("0\n1\n0\n")
    code, out = _run(capsys, nyud, "--workers", 0)
    assert code == 1 and "train.txt, line 3: '0' stands in line 1 already" in out and "train: 0 samples, 1 fault" in out
    (nyud / "gt_sets" / "train.txt").write_text("0\n7\n")
    code, out = _run(capsys, nyud, "--workers", 0)
    assert code == 0 and "warning: 1 samples are in train and in val: 7" in out
    (nyud / "gt_sets" / "val.txt").unlink()
    code, out = _run(capsys, nyud, "--workers", 0)
    assert code == 1 and "missing split file" in out


class Deadly(list):
    """Sample 5 kills its reader, as scipy does on some damaged files; 3 and 20 are faulty."""

    root = Path("data")

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if index in (3, 20):
            raise ValueError(f"file {index}")
        return index


def test_a_file_that_kills_its_reader_is_a_fault(capsys):
    found = list(check_data.faults(Deadly(range(24)), 2, "train"))
    assert found == ["file 3", "data: reading sample 5 ended the process: damaged file?", "file 20"]


def test_layouts_are_found_out(tmp_path, nyud, capsys):
    pascal = tmp_path / "PASCAL_MT"
    for folder in ("JPEGImages", "human_parts", "sal_distill", "ImageSets/Context"):
        (pascal / folder).mkdir(parents=True)
    for name in ("a", "b"):
        Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(pascal / "JPEGImages" / f"{name}.jpg")
        Image.fromarray(np.zeros((H, W), np.uint8)).save(pascal / "sal_distill" / f"{name}.png")
    (pascal / "ImageSets" / "Context" / "train.txt").write_text("a\n")
    (pascal / "ImageSets" / "Context" / "val.txt").write_text("b\n")
    savemat(pascal / "human_parts" / "a.mat", {"anno": np.zeros(3)})
    code, out = _run(capsys, pascal, "--workers", 0)
    assert code == 1 and f"{pascal}: pascal, human_parts, saliency" in out
    assert "anno is not as in PASCAL-Part" in out and f"missing file: {pascal / 'human_parts' / 'b.mat'}" in out

    own = tmp_path / "own"
    for folder in ("images", "depth"):
        (own / folder).mkdir(parents=True)
        for i in range(5):
            if folder == "images":
                Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(own / folder / f"{i}.png")
            elif i:
                np.save(own / folder / f"{i}.npy", np.full((H, W), 3.0))
    code, out = _run(capsys, own, "--workers", 0)
    assert code == 0 and f"{own}: folder, depth" in out
    assert sum(int(line.split()[1]) for line in out.splitlines()[1:]) == 5
    assert check_data.guess(nyud) == "nyud"

    classes = tmp_path / "classes"
    for split, name in (("train", "cat"), ("train", "dog"), ("val", "cat")):
        (classes / split / name).mkdir(parents=True)
        Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(classes / split / name / "0.png")
    _halve(classes / "train" / "dog" / "0.png")
    code, out = _run(capsys, classes, "--workers", 0)
    assert code == 1 and f"{classes}: image_folder, classification" in out and "dog/0.png" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such folder: nowhere"),
        (["."], "say what it is with --dataset"),
        ([".", "--dataset", "nyd"], "did you mean 'nyud'"),
        ([".", "--workers", "-1"], "--workers must not be negative"),
    ],
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert check_data.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_equal_names_in_folders_of_the_splits_are_different_samples(tmp_path, capsys):
    for split in ("train", "val"):
        for folder, shape in (("image", (8, 16, 3)), ("label_7", (8, 16))):
            (tmp_path / split / folder).mkdir(parents=True)
            np.save(tmp_path / split / folder / "0.npy", np.zeros(shape))
    code, out = _run(capsys, tmp_path, "--workers", 0)
    assert code == 0 and "cityscapes, semseg" in out and "warning" not in out
