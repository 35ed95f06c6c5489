"""PASCAL_MT: what labels become, pictures without labels, faults by name, and the drawn figures through a training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from m3bsr.data import build_transform
from m3bsr.data.pascal import NORMALS_CLASSES, PascalContext, label_edges, read_parts
from m3bsr.utils.constants import IGNORE

H, W = 24, 40
TASKS = PascalContext.known_tasks
SKY, WALL, PERSON_CLASS = 360, 440, 284


def _structs(*rows: dict) -> np.ndarray:
    array = np.empty((1, len(rows)), dtype=[(key, object) for key in rows[0]])
    for i, row in enumerate(rows):
        for key, value in row.items():
            array[0, i][key] = value
    return array


def _mask(rows: slice, columns: slice = slice(None)) -> np.ndarray:
    mask = np.zeros((H, W), np.uint8)
    mask[rows, columns] = 1
    return mask


def _thing(number: int, mask: np.ndarray, parts: dict[str, np.ndarray] | None = None) -> dict:
    rows = [{"part_name": name, "mask": part} for name, part in (parts or {}).items()]
    return {"class": "x", "class_ind": number, "mask": mask, "parts": _structs(*rows) if rows else np.empty((0, 0))}


def _annotation(path: Path, *things: dict) -> None:
    savemat(path, {"anno": _structs({"imname": path.stem, "objects": _structs(*things)})})


PARTS = {"head": _mask(slice(0, 4)), "ruarm": _mask(slice(4, 6)), "lfoot": _mask(slice(6, 8)), "torso": _mask(slice(9))}
LABEL_MAP = np.where(np.arange(W) < 10, SKY, WALL) * np.ones((H, 1), np.uint16)


@pytest.fixture
def root(tmp_path):
    """Pictures to train, ``a`` with a person and VOC labels and ``b`` with a dog, and one to validate."""
    root, rng = tmp_path / "PASCAL_MT", np.random.default_rng(0)
    for folder in (
        *("JPEGImages", "pascal-context/trainval", "semseg/VOC12", "semseg/pascal-context", "human_parts"),
        *("normals_distill", "sal_distill", "ImageSets/Context", "ImageSets/Parts"),
    ):
        (root / folder).mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 256, (H, W, 3), dtype=np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        savemat(root / "pascal-context" / "trainval" / f"{name}.mat", {"LabelMap": LABEL_MAP.astype(np.uint16)})
        labels = rng.integers(0, 21, (H, W), dtype=np.uint8)
        labels[0, 0] = 255
        Image.fromarray(labels).save(root / "semseg" / ("VOC12" if name == "a" else "pascal-context") / f"{name}.png")
        normals = np.full((H, W, 3), np.rint((np.array([0.6, 0, -0.8]) + 1) * 127.5), np.uint8)
        normals[1] = 127, 128, 127
        Image.fromarray(normals).save(root / "normals_distill" / f"{name}.png")
        Image.fromarray(np.arange(H * W, dtype=np.uint8).reshape(H, W)).save(root / "sal_distill" / f"{name}.png")
        dog, person = _thing(12, _mask(slice(20, 24))), _thing(15, _mask(slice(0, 20)), PARTS)
        _annotation(root / "human_parts" / f"{name}.mat", *([dog] if name == "b" else [dog, person]))
    (root / "ImageSets" / "Context" / "train.txt").write_text("a\nb\n")
    (root / "ImageSets" / "Context" / "val.txt").write_text("c\n")
    (root / "ImageSets" / "Parts" / "train.txt").write_text(json.dumps({"a": [12, 15], "b": [12]}))
    return root


def test_raw_values_become_targets(root):
    sample = PascalContext(root, "train", TASKS)[0]
    assert sample["image"].shape == (3, H, W) and sample["name"] == "a"
    raw = np.array(Image.open(root / "semseg" / "VOC12" / "a.png"))
    assert sample["semseg"].dtype == torch.int64 and (sample["semseg"][0].numpy() == raw).all()
    # Later parts overlay earlier ones: the torso is drawn last.
    assert sample["human_parts"][0, :10, 0].tolist() == [2] * 9 + [0]
    assert (sample["human_parts"][0] == sample["human_parts"][0, :, :1]).all()
    saliency = np.arange(H * W, dtype=np.uint8).reshape(H, W) > 127
    assert (sample["saliency"][0].numpy() == saliency).all()
    assert (sample["normals"][:, :, :10] == IGNORE).all(), "the sky has no normals that NYU could teach"
    assert (sample["normals"][:, 1] == IGNORE).all(), "a zero vector, rounded up and down"
    np.testing.assert_allclose(sample["normals"][:, 0, 20], [0.6, 0, -0.8], atol=0.01)
    assert sample["edge"].unique().tolist() == [0, 1] and sample["edge"].dtype == torch.float32
    lines = sample["edge"][0, 1:-1]
    assert (lines.sum(1) == 1).all() and (lines[:, 9:11].sum(1) == 1).all()


def test_parts_are_joined_to_six(root):
    _annotation(root / "human_parts" / "a.mat", _thing(15, _mask(slice(0, 9)), dict(list(PARTS.items())[:3])))
    labels = read_parts(root / "human_parts" / "a.mat")
    assert labels is not None and labels[0, :9, 0].tolist() == [1] * 4 + [3] * 2 + [6] * 2 + [0]


def test_edges_are_thin_and_lie_where_labels_change():
    labels = np.zeros((30, 30), int)
    labels[5:20, 8:25] = 1
    labels[10:15, 12:18] = 2
    edge = label_edges(labels)
    change = np.zeros_like(edge)
    change[1:] |= labels[1:] != labels[:-1]
    change[:-1] |= labels[1:] != labels[:-1]
    change[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    change[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    assert not (edge & ~change).any() and 0.4 < edge.sum() / change.sum() < 0.6
    assert not (edge[1:, 1:] & edge[:-1, 1:] & edge[1:, :-1] & edge[:-1, :-1]).any(), "no 2x2 block"
    # Labels 0, 1, 2 side by side: a Laplacian would be zero in the middle column.
    assert label_edges(np.tile([0, 1, 2], (5, 1)))[2].any()


def test_pictures_without_people_have_no_parts_and_need_no_file(root):
    (root / "human_parts" / "b.mat").unlink()
    sample = PascalContext(root, "train", TASKS)[1]
    assert (sample["human_parts"] == IGNORE).all() and sample["human_parts"].shape == (1, H, W)
    assert (sample["semseg"] != IGNORE).any()
    # Nothing is listed for the other split: its file is opened, and holds people without parts.
    _annotation(root / "human_parts" / "c.mat", _thing(15, _mask(slice(0, 9))))
    sample = PascalContext(root, "val", ("human_parts",))[0]
    assert (sample["human_parts"] == IGNORE).all() and sample["human_parts"].shape == (1, H, W)
    (root / "ImageSets" / "Parts" / "train.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing file: .*human_parts/b.mat, listed in .*train.txt"):
        PascalContext(root, "train", TASKS)


def test_only_the_folders_needed(root):
    for path in (root / "normals_distill").iterdir():
        path.unlink()
    (root / "normals_distill").rmdir()
    assert PascalContext.tasks_in(root) == ("semseg", "human_parts", "saliency", "edge")
    assert len(PascalContext(root, "train", ("edge", "semseg"), max_samples=1)) == 1
    with pytest.raises(FileNotFoundError, match="lacks normals_distill .*needed for task normals"):
        PascalContext(root, "train", TASKS)


def _drop(path: str):
    return lambda root: (root / path).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop("semseg/VOC12/a.png"), r"missing file: .*semseg/pascal-context/a.png"),
        (_drop("pascal-context/trainval/b.mat"), r"missing file: .*pascal-context/trainval/b.mat"),
        (_drop("sal_distill/b.png"), r"missing file: .*sal_distill/b.png"),
        (_drop("JPEGImages/b.jpg"), r"missing file: .*JPEGImages/b.jpg"),
        (lambda root: (root / "ImageSets" / "Context").rename(root / "Context"), "not in PASCAL_MT layout"),
        (lambda root: (root / "ImageSets" / "Parts" / "train.txt").write_text("{"), r"Parts/train.txt is no JSON"),
        (lambda root: (root / "ImageSets" / "Parts" / "train.txt").write_text("[]"), "expected a list of object"),
    ],
)
def test_a_faulty_folder_is_an_error_before_training(root, spoil, message):
    spoil(root)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        PascalContext(root, "train", TASKS)
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)


def _map(values: np.ndarray, name: str = "LabelMap"):
    return lambda root: savemat(root / "pascal-context" / "trainval" / "a.mat", {name: values})


def _bytes(path: str):
    def halve(root: Path) -> None:
        content = (root / path).read_bytes()
        (root / path).write_bytes(content[: len(content) // 2])

    return halve


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_map(np.full((H, W), 460)), "a.mat: label 460 is out of range; known: 0-459"),
        (_map(np.full((H, W), np.nan)), "a.mat: label nan is out of range"),
        (_map(LABEL_MAP, "labels"), "a.mat holds no variable LabelMap"),
        (_map(np.zeros((2, 3, 4))), "LabelMap must hold numbers"),
        (_map(LABEL_MAP[:-1]), r"normals_distill/a.png is 24x40 pixels, its LabelMap 23x40"),
        (_bytes("pascal-context/trainval/a.mat"), "cannot read .*trainval/a.mat"),
        (_bytes("human_parts/a.mat"), "cannot read .*human_parts/a.mat"),
        (_bytes("normals_distill/a.png"), "cannot read image .*normals_distill/a.png"),
        (
            lambda root: _annotation(
                root / "human_parts" / "a.mat", _thing(15, PARTS["head"], {"tail": PARTS["head"]})
            ),
            "unknown part 'tail' of a person; known: head, hair",
        ),
        (lambda root: savemat(root / "human_parts" / "a.mat", {"anno": np.ones(3)}), "anno is not as in PASCAL-Part"),
        (
            lambda root: _annotation(
                root / "human_parts" / "a.mat", _thing(15, PARTS["head"], {"head": PARTS["head"][:-2]})
            ),
            "human_parts/a.mat is 22x40 pixels, its image .*a.jpg 24x40",
        ),
        (
            lambda root: Image.fromarray(np.full((H, W, 3), (10, 10, 240), np.uint8)).save(
                root / "normals_distill" / "a.png"
            ),
            r"normals_distill/a.png: 2 v / 255 - 1 gives no unit vectors \(median length 1.57\)",
        ),
        (
            lambda root: Image.fromarray(np.full((H, W), 30, np.uint8)).save(root / "semseg" / "VOC12" / "a.png"),
            "VOC12/a.png: label 30 is out of range; known: 0-20, 255",
        ),
    ],
)
def test_a_faulty_file_names_itself(root, spoil, message):
    spoil(root)
    with pytest.raises(ValueError, match=message) as caught:
        PascalContext(root, "train", TASKS)[0]
    assert "\n" not in str(caught.value)


def test_the_classes_with_normals_are_those_of_both_data_sets():
    assert len(NORMALS_CLASSES) == 170
    assert {"wall", "floor", "ceiling", "person", "table", "sofa", "tvmonitor"} <= set(NORMALS_CLASSES.values())
    assert not {"sky", "grass", "road", "tree", "building", "unknown", "bus"} & set(NORMALS_CLASSES.values())
    assert NORMALS_CLASSES[WALL] == "wall" and NORMALS_CLASSES[PERSON_CLASS] == "person" and SKY not in NORMALS_CLASSES


@pytest.fixture(scope="module")
def drawn(load, tmp_path_factory):
    """Drawn figures: six pictures to train, three to validate."""
    out = tmp_path_factory.mktemp("drawn") / "PASCAL_MT"
    scenes = load("datasets/scenes/make_scenes.py")
    scenes.make_scenes(out, 8, 3, "source", (48, 64), 0, "PASCAL_MT", quiet=True)
    return out


def test_every_task_of_the_drawn_figures_loads_and_turns(drawn):
    transform = build_transform("astmt_rotate", (32, 48), train=True)
    dataset = PascalContext(drawn, "train", TASKS, transform=transform)
    seen: dict[str, set] = {task: set() for task in TASKS}
    torch.manual_seed(0)
    for index in range(len(dataset)):
        sample = dataset[index]
        for task in TASKS:
            assert sample[task].shape == (3 if task == "normals" else 1, 32, 48)
            if task != "normals":
                seen[task] |= set(sample[task].unique().tolist())
        valid = (sample["normals"] != IGNORE).all(0)
        assert torch.allclose(sample["normals"][:, valid].norm(dim=0), torch.ones(int(valid.sum())), atol=1e-4)
    assert seen["human_parts"] == {0, 1, 2, 3, 4, 5, 6, IGNORE} and seen["saliency"] == {0, 1, IGNORE}
    assert seen["edge"] == {0, 1, IGNORE} and {0, 15} < seen["semseg"] <= {*range(21), IGNORE}


def test_labels_at_their_own_size_are_those_on_disk(drawn):
    plain = PascalContext(drawn, "val", TASKS)[0]
    transform = build_transform("none", (32, 48), train=False)
    original = PascalContext(drawn, "val", TASKS, transform=transform, target_size="original")[0]
    assert original["image"].shape == (3, 32, 48)
    assert all(torch.equal(original[task], plain[task]) and plain[task].shape[-2:] == (48, 64) for task in TASKS)
