"""Reading one file: every kind of label image, every kind of file that is none, and nothing that is unpickled."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m3bsr.data.files import check_files, read_array, read_image, read_labels, read_names, resolve_root

TABLE = np.array([255, *range(40)], np.int16)  # 0 is void, classes count from 1


def _one_line(error: BaseException, path: Path) -> bool:
    return str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_labels_of_any_bit_depth_are_looked_up_in_the_table(tmp_path, mode):
    raw = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)
    if mode != "1":
        raw = raw * 7
    if mode == "I;16":
        image = Image.fromarray(raw.astype(np.uint16))
    elif mode == "1":
        image = Image.fromarray(raw.astype(bool))
    else:
        image = Image.fromarray(raw)
    if mode == "P":
        image.putpalette([255 - i for i in range(256)] * 3)  # colours that are not the indices
    image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == mode
    labels = read_labels(tmp_path / "a.png", TABLE)
    assert labels.dtype == torch.uint8 and labels.tolist() == [TABLE[raw].tolist()]


def test_labels_of_fractions_are_refused(tmp_path):
    Image.fromarray(np.full((4, 5), 1.5, np.float32)).save(tmp_path / "a.png", format="TIFF")
    with pytest.raises(ValueError, match="labels must be whole numbers, found float32") as caught:
        read_labels(tmp_path / "a.png", TABLE)
    assert _one_line(caught.value, tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (6, 4), (204, 204, 204)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 4, 6) and image.dtype == torch.uint8
    assert (image.int() - 204).abs().max() <= 3


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_grey_of_more_than_8_bits_is_not_cut_off(tmp_path, dtype):
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[200, 300]], dtype)).save(path)
    with pytest.raises(ValueError, match=r"a\.tif: a picture of 8 bits is expected; scale") as caught:
        read_image(path)
    assert _one_line(caught.value, path)


def test_a_png_of_pillows_own_bomb_size_is_one_line(tmp_path, monkeypatch):
    Image.new("L", (50, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow raises above twice that
    with pytest.raises(ValueError, match="cannot read image .*decompression bomb") as caught:
        read_image(tmp_path / "a.png")
    assert _one_line(caught.value, tmp_path / "a.png")


@pytest.mark.parametrize("read", [read_image, lambda path: read_labels(path, TABLE), lambda path: read_array(path, 1)])
def test_missing_files_and_folders_are_named(tmp_path, read):
    (tmp_path / "folder").mkdir()
    for name in ("nowhere.png", "folder"):
        with pytest.raises(FileNotFoundError, match=f"missing file: {re.escape(str(tmp_path / name))}"):
            read(tmp_path / name)


class _Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_is_never_loaded(tmp_path, wrapped):
    payload, path = _Payload(tmp_path / "mark"), tmp_path / "a.npy"
    if wrapped:
        np.save(path, np.array([payload], object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match="cannot read array") as caught:
        read_array(path, 1)
    assert _one_line(caught.value, path) and not (tmp_path / "mark").exists()


@pytest.mark.parametrize("dtype", ["float16", ">f4", "float64", "uint16", "bool"])
def test_arrays_of_any_number_type_and_order_become_float32(tmp_path, dtype):
    values = np.asfortranarray(np.arange(24).reshape(2, 4, 3) % 2).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    array = read_array(tmp_path / "a.npy", 3)
    assert array.dtype == torch.float32 and array.is_contiguous()
    assert torch.equal(array, torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(7), r"found shape \(7,\)"),
        (np.zeros((2, 3), complex), "found values of type complex128"),
    ],
)
def test_arrays_that_are_no_label_map_are_refused(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match=message) as caught:
        read_array(tmp_path / "a.npy", 1)
    assert _one_line(caught.value, tmp_path / "a.npy")


def test_an_archive_under_the_name_of_an_array_is_refused(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.savez(file, depth=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="expected one array, found an archive"):
        read_array(tmp_path / "a.npy", 1)


def test_names_keep_their_order_and_blank_lines_and_line_ends_do_not_matter(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"0003\r\n\n  0001 \r\ntwo words\n")
    assert read_names(tmp_path / "train.txt") == ["0003", "0001", "two words"]
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf0003\r\n")  # with a byte order mark, as Windows writes it
    assert read_names(tmp_path / "train.txt") == ["0003"]
    (tmp_path / "val.txt").write_text("0001\nsub\\0002\n")
    with pytest.raises(ValueError, match=r"val.txt, line 2: 'sub\\\\0002' is no plain file name"):
        read_names(tmp_path / "val.txt")


def test_missing_labels_are_counted(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.npy").touch()
    check_files(["a", "b"], tmp_path, ".npy", Path("train.txt"))
    with pytest.raises(FileNotFoundError, match=r"c\.npy, listed in train\.txt, and 1 more of 4$"):
        check_files(["a", "b", "c", "d"], tmp_path, ".npy", Path("train.txt"))


def test_a_file_is_no_root(tmp_path):
    (tmp_path / "NYUD_MT").touch()
    with pytest.raises(FileNotFoundError, match="data.root: no such folder: .*NYUD_MT; see datasets"):
        resolve_root(tmp_path / "NYUD_MT")
