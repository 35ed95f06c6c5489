"""Own data in a folder: every label in every format, missing labels, splits, classes found, and what faults say."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3bsr.data import build_transform
from m3bsr.data.folder import Folder, split_names
from m3bsr.utils.constants import IGNORE, NO_CLASS

H, W = 12, 20
DENSE = ("semseg", "human_parts", "depth", "normals", "edge", "saliency")
NAMES = [f"photo {i}" for i in range(10)]


def png(path: Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def npy(path: Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


@pytest.fixture
def root(tmp_path):
    """Ten images of several formats; labels of all tasks, as pictures for even numbers and as arrays for odd ones."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(NAMES):
        png(tmp_path / "images" / f"{name}.{('jpg', 'png', 'bmp')[i % 3]}", rng.integers(0, 256, (H, W, 3), np.uint8))
        save, suffix = (npy, "npy") if i % 2 else (png, "png")
        classes = np.full((H, W), i % 5, np.uint8)
        classes[0, 0] = 255
        yes = np.zeros((H, W), np.uint8)
        yes[:, 3] = 1 if i % 2 else 255
        normals = np.full((H, W, 3), (0.6, 0, -0.8), np.float32)
        depth = np.full((H, W), 2.5, np.float32)
        depth[0, 0] = 0
        for task in ("semseg", "human_parts"):
            save(tmp_path / task / f"{name}.{suffix}", classes)
        for task in ("edge", "saliency"):
            save(tmp_path / task / f"{name}.{suffix}", yes)
        save(tmp_path / "depth" / f"{name}.{suffix}", depth if i % 2 else (1000 * depth).astype(np.uint16))
        picture = np.rint((normals + 1) * 127.5).astype(np.uint8)
        save(tmp_path / "normals" / f"{name}.{suffix}", normals if i % 2 else picture)
    rows = [f"{name},{'cat' if i % 2 else 'ant'}" for i, name in enumerate(NAMES)]
    (tmp_path / "classification.csv").write_text("name,class\n" + "\n".join(rows[:-1]) + "\n")
    return tmp_path


def test_pictures_and_arrays_give_the_same_targets(root):
    samples = [s for split in ("train", "val") for s in _all(Folder(root, split, Folder.known_tasks))]
    assert sorted(sample["name"] for sample in samples) == NAMES
    for sample in samples:
        i = NAMES.index(sample["name"])
        assert sample["image"].shape == (3, H, W)
        for task in ("semseg", "human_parts"):
            assert sample[task].dtype == torch.int64
            assert sample[task][0, 0, :2].tolist() == [IGNORE, i % 5] and (sample[task][0, 1:] == i % 5).all()
        assert sample["depth"][0, 0, :2].tolist() == [IGNORE, 2.5]
        np.testing.assert_allclose(sample["normals"][:, 5, 5], [0.6, 0, -0.8], atol=0.01)
        for task in ("edge", "saliency"):
            assert sample[task][0, 5, 2:5].tolist() == [0, 1, 0]
        expected = NO_CLASS if i == 9 else i % 2
        assert sample["classification"].shape == () and int(sample["classification"]) == expected


def _all(dataset):
    return [dataset[i] for i in range(len(dataset))]


def test_images_without_labels_train_the_other_tasks(root, caplog):
    caplog.set_level(logging.INFO, logger="m3bsr")
    dataset = Folder(root, "train", (*DENSE, "classification"))
    assert not caplog.records or "classification" in caplog.text
    for task in DENSE:
        for path in (root / task).iterdir():
            if path.stem == dataset.names[0]:
                path.unlink()
    dataset = Folder(root, "train", DENSE, transform=build_transform("astmt_rotate", (16, 32), train=True))
    assert f"{root}, train: 7 of 8 images have depth" in caplog.text
    for task in DENSE:
        target = dataset[0][task]
        assert target.shape == (3 if task == "normals" else 1, 16, 32) and (target == IGNORE).all()
        assert (dataset[1][task] != IGNORE).any()


def test_the_split_is_a_fifth_and_stays_when_images_are_added(root):
    train, val = (Folder(root, split, ("depth",)).names for split in ("train", "val"))
    assert len(val) == 2 and sorted(train + val) == NAMES
    many = [f"{i:03d}" for i in range(100)]
    before, after = (set(split_names(root, "val", many[:n])) for n in (90, 100))
    assert len(before) == 18 and len(after) == 20 and len(before & after) >= 15
    (root / "splits").mkdir()
    (root / "splits" / "test.txt").write_text("photo 3\nphoto 1\n")
    assert Folder(root, "test", ("depth",)).names == ["photo 3", "photo 1"]
    with pytest.raises(FileNotFoundError, match=r"train.txt \(splits there: test\)"):
        Folder(root, "train", ("depth",))
    (root / "splits" / "test.txt").write_text("photo 3\nphoto 30\n")
    with pytest.raises(FileNotFoundError, match=r"missing file: .*images/photo 30\.\*, listed in splits/test.txt"):
        Folder(root, "test", ("depth",))


def test_the_number_of_classes_is_found_or_named(root):
    found = Folder.read_task_kwargs(root)
    assert found == {
        "semseg": {"num_classes": 5},
        "human_parts": {"num_classes": 5},
        "classification": {"num_classes": 2},
    }
    assert Folder(root, "train", ("classification",)).class_names == {"classification": ("ant", "cat")}
    (root / "semseg.txt").write_text("\n".join("abcdefg"))
    assert Folder.read_task_kwargs(root)["semseg"] == {"num_classes": 7}
    assert Folder(root, "train", ("semseg",)).class_names == {"semseg": tuple("abcdefg")}
    (root / "semseg.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"semseg/photo 2.png: label 2 is out of range; semseg.txt names 2"):
        for sample in Folder(root, "train", ("semseg",)), Folder(root, "val", ("semseg",)):
            _all(sample)
    (root / "semseg.txt").write_text("a\na\n")
    with pytest.raises(ValueError, match="semseg.txt: expected the names of the classes, one a line, each once"):
        Folder.read_task_kwargs(root)


def test_a_new_label_is_counted(root):
    assert Folder.read_task_kwargs(root)["semseg"] == {"num_classes": 5}
    png(root / "semseg" / "new.png", np.full((H, W), 8, np.uint8))
    assert Folder.read_task_kwargs(root)["semseg"] == {"num_classes": 9}


def _write(path: str, content: str):
    return lambda root: (root / path).write_text(content)


def _remove(folder: str):
    def remove(root: Path) -> None:
        for path in (root / folder).iterdir():
            path.unlink()

    return remove


@pytest.mark.parametrize(
    ("spoil", "tasks", "message"),
    [
        (_remove("images"), ("depth",), "images holds no image; known: .jpg"),
        (_remove("semseg"), ("semseg",), "no image of split train has a label of semseg"),
        (lambda root: (root / "edge").rename(root / "edges"), ("edge",), "has no folder edge, needed for task edge"),
        (
            lambda root: png(root / "semseg" / "x.jpg", np.zeros((H, W), np.uint8)),
            ("semseg",),
            "semseg/x.jpg: semseg is read from .png or .npy only",
        ),
        (
            lambda root: png(root / "images" / "photo 0.png", np.zeros((H, W), np.uint8)),
            ("depth",),
            "images holds both photo 0.jpg and photo 0.png",
        ),
        (_write("classification.csv", "a,b,c\n"), ("classification",), r"csv, line 1: expected .* found 'a,b,c'"),
        (_write("classification.csv", "a,b\na.jpg,c\n"), ("classification",), "csv, line 2: 'a' has a class already"),
        (_write("classification.csv", "a,b\n"), ("classification",), "classification: it names 'a', images 'photo "),
        (lambda root: (root / "classification.csv").unlink(), ("classification",), "has no classification.csv, needed"),
    ],
)
def test_a_faulty_folder_is_an_error_before_training(root, spoil, tasks, message):
    spoil(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Folder(root, "train", tasks)
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("depth", np.full((H, W), 200, np.uint8), "depth beyond 25 cm is expected"),
        ("depth", np.full((H, W), 2500.0), "depth 2500 is out of range, metres"),
        ("semseg", np.full((H, W), 1.5), "label 1.5 is out of range; known: whole numbers 0-255"),
        ("normals", np.full((H, W, 3), 99.0), "a normal of length"),
        ("edge", np.zeros((H - 1, W), np.uint8), "is 11x20 pixels, its image .* 12x20$"),
        ("edge", np.zeros((W, H), np.uint8), "is 20x12 pixels, its image .* 12x20 .pixels count as they are stored"),
    ],
)
def test_a_faulty_file_names_itself(root, task, values, message):
    for path in list((root / task).iterdir()):
        path.unlink()
        (png if values.dtype == np.uint8 else npy)(
            path.with_suffix(".png" if values.dtype == np.uint8 else ".npy"), values
        )
    with pytest.raises(ValueError, match=message) as caught:
        Folder(root, "train", (task,))[0]
    assert f"{task}/photo" in str(caught.value) and "\n" not in str(caught.value)


def test_without_splits_there_is_no_third_one(root, tmp_path):
    with pytest.raises(ValueError, match="only train and val, no 'test'"):
        Folder(root, "test", ("depth",))
    with pytest.raises(ValueError, match="holds one image, too few"):
        split_names(root, "train", ["a"])
