"""The NYUD_MT loader: what each raw value becomes, where data is looked for, and what faulty data says."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from m3bsr.data import DATASETS, NYUD, build_transform
from m3bsr.data.files import dataset_path, read_array, read_image
from m3bsr.engine.loader import collate
from m3bsr.tasks import TASKS
from m3bsr.utils.constants import IGNORE

H, W = 24, 40
TASK_NAMES = NYUD.known_tasks
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "NYUD_MT"


def _put(root: Path, folder: str, values: np.ndarray, name: str = "a") -> None:
    if folder == "segmentation":
        Image.fromarray(values).save(root / folder / f"{name}.png")
    else:
        np.save(root / folder / f"{name}.npy", values)


def test_raw_values_become_targets(root):
    labels = np.ones((H, W), np.uint8)
    labels[0, :4] = 0, 1, 40, 255
    depth = np.full((H, W), 2.5, np.float64)
    depth[0, :5] = 0, -1, np.nan, np.inf, 255
    normals = np.full((H, W, 3), (0, -2 * 0.6, 2 * 0.8), np.float32)
    normals[0, 0], normals[0, 1], normals[0, 2] = 0, np.nan, 255
    edge = np.zeros((H, W), np.float32)
    edge[0, :4] = 0, 1, np.nan, 255
    for folder, values in {"segmentation": labels, "depth": depth, "normals": normals, "edge": edge}.items():
        _put(root, folder, values)
    sample = NYUD(root, "train", TASK_NAMES)[0]
    assert sample["name"] == "a" and sample["index"] == 0
    assert sample["image"].shape == (3, H, W) and sample["image"].dtype == torch.uint8
    assert sample["semseg"].dtype == torch.int64 and sample["semseg"][0, 0, :5].tolist() == [IGNORE, 0, 39, IGNORE, 0]
    assert sample["depth"].dtype == torch.float32 and sample["depth"][0, 0, :6].tolist() == [IGNORE] * 5 + [2.5]
    assert (sample["normals"][:, 0, :3] == IGNORE).all()
    assert sample["normals"][:, 1, 1].tolist() == pytest.approx([0, -0.6, 0.8])
    assert sample["edge"][0, 0, :5].tolist() == [0, 1, IGNORE, IGNORE, 0]
    assert all(type(value) is torch.Tensor for key, value in sample.items() if key in ("image", *TASK_NAMES))


def test_edges_written_as_0_and_255_are_edges(root):
    edge = np.zeros((H, W), np.uint8)
    edge[3, 5] = 255
    _put(root, "edge", edge)
    assert NYUD(root, "train", ("edge",))[0]["edge"].unique().tolist() == [0, 1]


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_agrees_with_the_tasks(name):
    dataset = DATASETS[name]
    for task in dataset.known_tasks:
        assert TASKS[task](**dataset.task_kwargs.get(task, {})).num_channels > 0
    for task, kwargs in dataset.task_kwargs.items():
        if "num_classes" in kwargs and isinstance(dataset.class_names, dict):  # others know theirs from a folder
            assert len(set(dataset.class_names[task])) == len(dataset.class_names[task]) == kwargs["num_classes"]


def test_original_size_leaves_labels_alone_and_batches_of_mixed_sizes_are_lists(root):
    transform = build_transform("none", (48, 64), train=False)
    network = NYUD(root, "train", TASK_NAMES, transform=transform)
    original = NYUD(root, "train", TASK_NAMES, transform=transform, target_size="original")
    plain = NYUD(root, "train", TASK_NAMES)
    resized = NYUD(root, "train", TASK_NAMES, transform=transform, target_size="resized:48x64")
    assert all(torch.equal(resized[0][name], network[0][name]) for name in ("image", *TASK_NAMES))
    assert NYUD(root, "train", TASK_NAMES, target_size="resized:9x7")[0]["semseg"].shape == (1, 9, 7)
    assert torch.equal(network[0]["image"], original[0]["image"])
    for task in TASK_NAMES:
        assert network[0][task].shape[-2:] == (48, 64)
        assert torch.equal(original[0][task], plain[0][task])
    assert collate([original[0], original[1]])["depth"].shape == (2, 1, H, W)
    Image.fromarray(np.zeros((H, 2 * W, 3), np.uint8)).save(root / "images" / "b.jpg")
    _put(root, "depth", np.ones((H, 2 * W), np.float32), "b")
    depth = NYUD(root, "train", ("depth",), transform=transform, target_size="original")
    batch = collate([depth[0], depth[1]])
    assert batch["image"].shape == (2, 3, 48, 64) and batch["name"] == ["a", "b"]
    assert [label.shape for label in batch["depth"]] == [(1, H, W), (1, H, 2 * W)]


def test_max_samples_and_only_the_folders_needed(root):
    for folder in ("normals", "edge"):
        for path in (root / folder).iterdir():
            path.unlink()
        (root / folder).rmdir()
    dataset = NYUD(root, "train", ("depth",), max_samples=2)
    assert len(dataset) == 2 and dataset.names == ["a", "b"]
    message = r"no folder normals, needed for task normals; tasks with labels there: semseg, depth$"
    with pytest.raises(FileNotFoundError, match=message):
        NYUD(root, "train", ("depth", "normals"))


@pytest.mark.parametrize(
    ("given_path", "moved"),
    [
        ("datasets/nyud/NYUD_MT", "/big/nyud/NYUD_MT"),
        ("nyud/NYUD_MT", "/big/nyud/NYUD_MT"),
        ("/abs/NYUD_MT", "/abs/NYUD_MT"),
        ("../shared/NYUD_MT", "../shared/NYUD_MT"),
    ],
)
def test_environment_variable_moves_relative_roots(monkeypatch, given_path, moved):
    assert dataset_path(given_path) == Path(given_path)
    monkeypatch.setenv("M3BSR_DATASETS", "/big")
    assert dataset_path(given_path) == Path(moved)


def test_data_is_found_where_the_environment_variable_says(root, monkeypatch):
    monkeypatch.setenv("M3BSR_DATASETS", str(root.parent))
    assert len(NYUD("datasets/NYUD_MT", "val", ("depth",))) == 1
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*elsewhere \(from datasets/elsewhere by M3BSR"):
        NYUD("datasets/elsewhere", "val", ("depth",))


def _write(path: str, content: str | bytes):
    def spoil(root: Path) -> None:
        (root / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def _rename(path: str, target: str):
    return lambda root: (root / path).rename(root / target)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            _rename("gt_sets/train.txt", "gt_sets/other.txt"),
            FileNotFoundError,
            r"train.txt \(splits there: other, val\)",
        ),
        (_write("gt_sets/train.txt", " \n\n"), ValueError, "train.txt names no samples"),
        (_write("gt_sets/train.txt", "a\nb\n\na\n"), ValueError, "train.txt, line 4: 'a' stands in line 1 already"),
        (_write("gt_sets/train.txt", "../../etc/passwd\n"), ValueError, "line 1: '../../etc/passwd' is no plain file"),
        (_write("gt_sets/train.txt", b"\xff\xfe\x00"), ValueError, "train.txt is no text file"),
        (
            _write("gt_sets/train.txt", "a\nx\ny\n"),
            FileNotFoundError,
            "images/x.jpg, listed in .*train.txt, and 1 more",
        ),
        (
            _rename("depth/b.npy", "depth/bb.npy"),
            FileNotFoundError,
            "missing file: .*depth/b.npy, listed in .*train.txt$",
        ),
        (_rename("images/a.jpg", "images/a.png"), FileNotFoundError, "there is a.png: another packaging"),
        (_rename("images", "pictures"), FileNotFoundError, "has no folder images: not in NYUD_MT layout"),
    ],
)
def test_a_faulty_folder_is_an_error_before_training(root, spoil, error, message):
    spoil(root)
    with pytest.raises(error, match=message) as caught:
        NYUD(root, "train", TASK_NAMES)
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)


def _labels(value: int, dtype=np.uint8) -> np.ndarray:
    return np.full((H, W), value, dtype)


def _array(folder: str, values: np.ndarray, **kwargs):
    return lambda root: np.save(root / folder / "a.npy", values, **kwargs)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: _put(root, "segmentation", _labels(41)), "segmentation/a.png: label 41 .*known: 0-40, 255$"),
        (lambda root: _put(root, "segmentation", _labels(999, np.uint16)), "segmentation/a.png: label 999 is out of"),
        (lambda root: _put(root, "segmentation", np.zeros((H, W, 3), np.uint8)), "a.png: labels must have one channel"),
        (lambda root: _put(root, "segmentation", _labels(1)[:-1]), "segmentation/a.png is 23x40 .*a.jpg 24x40"),
        (_array("depth", np.full((H, W), 3021.0)), "depth/a.npy: depth 3021 is out of range, metres up to 100"),
        (_array("depth", np.full((H, W), "far")), "depth/a.npy: expected numbers, found values of type <U3"),
        (_array("depth", np.full((H, W, 3), 1.0)), r"depth/a.npy: expected .H, W. with 1 channel.*\(24, 40, 3\)"),
        (_array("depth", np.array([{}], object), allow_pickle=True), "cannot read array .*depth/a.npy.*object"),
        (_array("normals", np.full((H, W, 3), 128.0)), "normals/a.npy: a normal of length 221.702, unit vectors"),
        (_array("edge", np.zeros((H + 1, W))), "edge/a.npy is 25x40 pixels, its image .*images/a.jpg 24x40"),
        (_write("images/a.jpg", "no picture"), "cannot read image .*images/a.jpg"),
        (_write("depth/a.npy", b""), "cannot read array .*depth/a.npy"),
    ],
)
def test_a_faulty_file_names_itself(root, spoil, message):
    spoil(root)
    with pytest.raises(ValueError, match=message) as caught:
        NYUD(root, "train", TASK_NAMES)[0]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["images/a.jpg", "segmentation/a.png", "depth/a.npy", "normals/a.npy", "edge/a.npy"])
def test_a_truncated_file_names_itself(root, file):
    content = (root / file).read_bytes()
    (root / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"cannot read .*{file}"):
        NYUD(root, "train", TASK_NAMES)[0]


def test_huge_files_are_refused_before_memory_is_taken(tmp_path, monkeypatch):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**7)})
    (tmp_path / "bomb.npy").write_bytes(header.getvalue() + b"\0" * 64)
    with pytest.raises(ValueError, match="cannot read array .*bomb.npy"):
        read_array(tmp_path / "bomb.npy", 1)
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "large.png")
    np.save(tmp_path / "large.npy", np.zeros((30, 30)))
    monkeypatch.setattr("m3bsr.data.files.MAX_PIXELS", 899)
    with pytest.raises(ValueError, match="large.png: 30 x 30 pixels are more than the 899 allowed"):
        read_image(tmp_path / "large.png")
    with pytest.raises(ValueError, match="large.npy: 30 x 30 pixels"):
        read_array(tmp_path / "large.npy", 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["images/a.jpg", "segmentation/a.png", "depth/a.npy"]), st.data())
def test_damaged_bytes_give_a_sample_or_a_value_error(root, file, data):
    path = root / file
    good = path.read_bytes()
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(good), 200) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        sample = NYUD(root, "train", ("semseg", "depth"))[0]
        assert sample["semseg"].max() <= IGNORE and sample["depth"].isfinite().all()
    except ValueError as error:
        assert file in str(error) or "images/a.jpg" in str(error)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("arguments", [{"max_samples": 0}, {"target_size": "native"}])
def test_bad_arguments_are_named(root, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NYUD(root, "train", ("depth",), **arguments)
    with pytest.raises(ValueError, match="unknown task of NYUD 'dept'.*did you mean 'depth'"):
        NYUD(root, "train", ("dept",))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no sample of real NYU Depth v2 at {REAL}")
def test_real_frames_load_with_plausible_labels():
    with pytest.raises(FileNotFoundError, match="no folder normals.*semseg, depth, edge"):
        NYUD(REAL, "val", TASK_NAMES)
    dataset = NYUD(REAL, "val", ("semseg", "depth", "edge"), transform=build_transform("none", (96, 128), train=False))
    assert len(dataset) == 100
    for index in (0, 50, 99):
        sample = dataset[index]
        assert sample["image"].shape == (3, 96, 128) and sample["image"].abs().max() < 3
        classes = sample["semseg"][sample["semseg"] != IGNORE]
        assert classes.min() >= 0 and classes.max() < 40 and len(classes.unique()) > 2
        depth = sample["depth"][sample["depth"] != IGNORE]
        assert depth.min() > 0.3 and depth.max() < 11 and depth.std() > 0.1
        assert 0.002 < (sample["edge"] == 1).float().mean() < 0.3
    assert (REAL / "class_names.txt").read_text().split("\n")[:40] == list(NYUD.class_names["semseg"])
    assert re.fullmatch(r"\d{4}", dataset[0]["name"])
