"""From raw values to targets: masks of every kind of picture, class tables, MATLAB files that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from m3bsr.data.targets import blank, class_table, read_classes, read_depth, read_mask, read_matlab
from m3bsr.data.transforms import Depth, Edge, Labels, Normals
from m3bsr.utils.constants import IGNORE

YES = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "L 0 and 1", "P 0 and 1"])
def test_masks_of_any_kind_of_picture(tmp_path, mode):
    path = tmp_path / "mask.png"
    if mode.endswith("0 and 1"):
        image = Image.fromarray(YES)
        if mode[0] == "P":
            image.putpalette([0, 0, 0, 128, 0, 0])  # colours that as grey would be no
    else:
        image = Image.fromarray(YES * 255).convert("L" if mode == "P" else mode)
        if mode == "P":
            image = image.convert("P")
    image.save(path)
    mask = read_mask(path)
    assert isinstance(mask, Edge) and mask.dtype == torch.float32 and mask.tolist() == [YES.tolist()]


def test_grey_masks_are_cut_in_the_middle_and_one_without_a_yes_stays_so(tmp_path):
    Image.fromarray(np.array([[0, 1, 127, 128, 255]], np.uint8)).save(tmp_path / "grey.png")
    assert read_mask(tmp_path / "grey.png").tolist() == [[[0, 0, 0, 1, 1]]]
    Image.fromarray(np.array([[0, 1, 255]], np.uint8)).save(tmp_path / "hole.png")
    assert read_mask(tmp_path / "hole.png").tolist() == [[[0, 1, IGNORE]]]
    Image.fromarray(np.zeros((1, 3), np.uint8)).save(tmp_path / "none.png")
    assert read_mask(tmp_path / "none.png").tolist() == [[[0, 0, 0]]]
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png: a picture of 8 bits is expected, found uint16"):
        read_mask(tmp_path / "deep.png")


def test_class_tables(tmp_path):
    Image.fromarray(np.array([[0, 1, 3, 255]], np.uint8)).save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    assert read_classes(path, class_table(4)).tolist() == [[[0, 1, 3, IGNORE]]]
    assert read_classes(path, class_table(3, first=1, void=(0, 255))).tolist() == [[[IGNORE, 0, 2, IGNORE]]]
    assert read_classes(path, class_table(IGNORE)).tolist() == [[[0, 1, 3, IGNORE]]]
    with pytest.raises(ValueError, match="label 3 is out of range; known: 0-2, 255"):
        read_classes(path, class_table(3))


@pytest.mark.parametrize(
    ("task", "kind", "channels"),
    [
        ("semseg", Labels, 1),
        ("human_parts", Labels, 1),
        ("depth", Depth, 1),
        ("normals", Normals, 3),
        ("edge", Edge, 1),
    ],
)
def test_a_blank_target_is_of_the_type_that_the_transforms_know(task, kind, channels):
    target = blank(task, (4, 6))
    assert isinstance(target, kind) and target.shape == (channels, 4, 6) and (target == IGNORE).all()


def test_matlab_files(tmp_path):
    path = tmp_path / "a.mat"
    with pytest.raises(FileNotFoundError, match="missing file: .*a.mat"):
        read_matlab(path, "x")
    savemat(path, {"x": np.eye(2), "y": "text"})
    assert (read_matlab(path, "x") == np.eye(2)).all()
    with pytest.raises(ValueError, match="a.mat holds no variable z"):
        read_matlab(path, "z")
    for content in (b"", b"no MATLAB file", b"MATLAB 7.3 MAT-file" + bytes(200)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.mat") as caught:
            read_matlab(path, "x")
        assert "\n" not in str(caught.value)


def test_a_matlab_file_cut_anywhere_is_a_value_error(tmp_path):
    path = tmp_path / "a.mat"
    savemat(path, {"x": np.arange(600).reshape(20, 30)}, do_compression=True)
    content = path.read_bytes()
    for length in range(0, len(content), 9):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="a.mat") as caught:
            read_matlab(path, "x")
        assert "\n" not in str(caught.value)


def test_nan_depths_are_holes_said_once_a_folder_and_nothing_else_is_an_error(tmp_path, caplog):
    depth = np.full((4, 5), 2.0, np.float32)
    depth[0, :3] = np.nan
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", depth)
        assert (read_depth(tmp_path / f"{name}.npy")[0, 0, :3] == IGNORE).all()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"{tmp_path / 'a.npy'}: 3 of 20 depths are NaN, taken as holes (said once a folder)"]
    np.save(tmp_path / "c.npy", np.full((4, 5), np.nan))
    with pytest.raises(ValueError, match=r"c\.npy: every depth is NaN"):
        read_depth(tmp_path / "c.npy")
