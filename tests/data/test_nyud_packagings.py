"""The two packagings of NYUD: found out, said, read to the same targets, and never mixed."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from m3bsr.data import NYUD, build_transform
from m3bsr.data.dense import trim_evenly
from m3bsr.utils.constants import IGNORE

TASKS = NYUD.known_tasks
H, W = 24, 40


@pytest.fixture
def pair(root, tmp_path):
    """The same frames in both packagings, images and labels 24x40."""
    other = tmp_path / "NYUDv2"
    for folder in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (other / folder).mkdir(parents=True)
    for name in ("a", "b", "c", "d"):
        Image.open(root / "images" / f"{name}.jpg").save(other / "images" / f"{name}.png")
        Image.open(root / "segmentation" / f"{name}.png").save(other / "segmentation" / f"{name}.png")
        np.save(other / "depth" / f"{name}.npy", np.load(root / "depth" / f"{name}.npy"))
        normals = np.load(root / "normals" / f"{name}.npy")
        Image.fromarray(np.rint((normals + 1) * 127.5).astype(np.uint8)).save(other / "normals" / f"{name}.png")
        Image.fromarray(np.load(root / "edge" / f"{name}.npy") * 255).save(other / "edge" / f"{name}.png")
    for split in ("train", "val"):
        (other / "gt_sets" / f"{split}.txt").write_text((root / "gt_sets" / f"{split}.txt").read_text())
    return root, other


def test_both_give_the_same_targets_and_say_which_they_are(pair, caplog):
    caplog.set_level(logging.INFO, logger="m3bsr")
    ours, theirs = (NYUD(root, "train", TASKS)[0] for root in pair)
    assert [record.message.split(": packaging ")[1] for record in caplog.records] == [
        "NYUD_MT (ASTMT)",
        "NYUDv2 (ATRC)",
    ]
    # 24x40 is padded to 32x64: 4 rows above and below, 12 columns on both sides.
    assert theirs["image"].shape == (3, 32, 64)
    inner = (slice(None), slice(4, 28), slice(12, 52))
    for task in TASKS:
        border = theirs[task].clone()
        border[inner] = IGNORE
        assert (border == IGNORE).all()
        torch.testing.assert_close(theirs[task][inner], ours[task], atol=0.01, rtol=0)
    assert torch.equal(theirs["image"][inner], ours["image"])
    assert theirs["image"][:, 0, 0].tolist() == [124, 116, 104]


def test_frames_of_the_published_size_are_padded_for_the_network(tmp_path):
    for folder in ("images", "edge", "gt_sets"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.zeros((425, 560, 3), np.uint8)).save(tmp_path / "images" / "1.png")
    Image.fromarray(np.zeros((425, 560), np.uint8)).save(tmp_path / "edge" / "1.png")
    (tmp_path / "gt_sets" / "val.txt").write_text("1\n")
    transform = build_transform("none", (224, 288), train=False)
    network = NYUD(tmp_path, "val", ("edge",), transform=transform)[0]
    original = NYUD(tmp_path, "val", ("edge",), transform=transform, target_size="original")[0]
    assert network["edge"].shape == (1, 224, 288) and original["edge"].shape == (1, 448, 576)
    assert torch.equal(network["image"], original["image"])
    assert int((original["edge"] != IGNORE).sum()) == 425 * 560
    stored = NYUD(tmp_path, "val", ("edge",), target_size="original").stored_size("1")
    assert stored == (425, 560) and (trim_evenly(original["edge"], stored) != IGNORE).all()
    with pytest.raises(ValueError, match="resized:425x560 is the size of the files of NYUDv2"):
        NYUD(tmp_path, "val", ("edge",), target_size="resized:425x560")


@pytest.mark.parametrize(("folder", "suffix"), [("normals", ".npy"), ("edge", ".npy")])
def test_labels_of_the_other_packaging_are_a_mix_up(pair, folder, suffix):
    ours, theirs = pair
    for mixed, labels in ((theirs, ours), (ours, theirs)):
        kept = mixed / "kept"
        (mixed / folder).rename(kept)
        (mixed / folder).mkdir()
        for path in (labels / (folder if labels is ours else "kept")).iterdir():
            (mixed / folder / path.name).write_bytes(path.read_bytes())
        with pytest.raises(ValueError, match=rf"mixes two packagings: images are .*, yet {folder} holds \.") as caught:
            NYUD(mixed, "train", TASKS)
        assert str(mixed) in str(caught.value) and "\n" not in str(caught.value)
        NYUD(mixed, "train", ("semseg", "depth"))  # what is not mixed can be trained


def test_normals_written_as_numbers_of_a_picture_are_refused(pair):
    np.save(pair[0] / "normals" / "a.npy", np.full((H, W, 3), 128.0))
    with pytest.raises(ValueError, match="a normal of length 221.702, unit vectors are expected"):
        NYUD(pair[0], "train", TASKS)[0]
    Image.fromarray(np.full((H, W, 3), 250, np.uint8)).save(pair[1] / "normals" / "a.png")
    with pytest.raises(ValueError, match=r"normals/a.png: 2 v / 255 - 1 gives no unit vectors"):
        NYUD(pair[1], "train", TASKS)[0]


def test_normals_written_as_a_picture_between_0_and_1_are_refused(pair):
    path = pair[0] / "normals" / "a.npy"
    np.save(path, (np.load(path) + 1) / 2)
    with pytest.raises(ValueError, match=r"normals/a.npy: no component is negative, and lengths are not 1"):
        NYUD(pair[0], "train", TASKS)[0]
    np.save(path, np.full((H, W, 3), (0.6, 0, 0.8)))  # a wall; of one sign, but of length 1
    assert (NYUD(pair[0], "train", TASKS)[0]["normals"] != IGNORE).all()


def test_holes_of_pictures(pair):
    normals = np.full((H, W, 3), (204, 128, 26), np.uint8)  # .6, 0, -.8
    normals[0, :3] = [[0] * 3, [255] * 3, [127] * 3]
    Image.fromarray(normals).save(pair[1] / "normals" / "a.png")
    edge = np.zeros((H, W), np.uint8)
    edge[0, :3] = 1, 255, 0
    Image.fromarray(edge).save(pair[1] / "edge" / "a.png")
    sample = NYUD(pair[1], "train", TASKS)[0]
    assert (sample["normals"][:, 4, 12:15] == IGNORE).all() and (sample["normals"][:, 4, 15] != IGNORE).all()
    assert sample["edge"][0, 4, 12:15].tolist() == [1, IGNORE, 0], "written as 0 and 1, with 255 for what is unknown"


def test_an_edge_picture_of_grey_values_is_cut_in_the_middle(pair):
    edge = np.zeros((H, W), np.uint8)
    edge[0, :3] = 127, 128, 255
    Image.fromarray(edge).save(pair[1] / "edge" / "a.png")
    assert NYUD(pair[1], "train", TASKS)[0]["edge"][0, 4, 12:15].tolist() == [0, 1, 1]
