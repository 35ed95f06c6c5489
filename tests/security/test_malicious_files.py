"""Files that were made to do harm: each is refused with one line, and nothing in it ran.

The files are real: a pickle that would write a file, archives that climb out, bombs.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from safetensors.torch import save_file

from m3bsr.backbones import load_weights, read_weights
from m3bsr.backbones.moe_vit import MoEVisionTransformer
from m3bsr.data.archives import unpack
from m3bsr.data.files import read_array, read_image, read_names
from m3bsr.data.targets import read_matlab
from m3bsr.engine import CheckpointError, save_checkpoint
from m3bsr.engine.checkpoint import load_state, newest_checkpoint, verify_checkpoint

HUGE = 100_000


class Evil:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def mark(tmp_path):
    """What must not be there after a test."""
    path = tmp_path / "pwned"
    yield path
    assert not path.exists(), "code in the file was run"


def refused(call, *args, match=".", most=200 * 2**20):
    """The call fails with a line, without taking much memory or time."""
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
            call(*args)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert peak < most and time.process_time() - began < 10
    return str(error.value)


# weights and checkpoints


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin"])
@pytest.mark.parametrize("old_format", [False, True])
def test_weights_with_code(tmp_path, mark, name, old_format):
    path = tmp_path / name
    torch.save({"model": {"a": Evil(mark)}}, path, _use_new_zipfile_serialization=not old_format)
    assert str(path) in refused(read_weights, path, match="model.weights: cannot read .* safely")
    path.write_bytes(pickle.dumps(Evil(mark)))
    refused(read_weights, path, match="model.weights: cannot read .* safely")


def test_weights_that_are_a_bomb(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data if "data/" not in name else bytes(1 << 25))
    assert str(path) in refused(read_weights, path, match="would grow from .* bytes")


def test_a_view_that_claims_more_than_the_file_holds(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"pos_embed": torch.zeros(1).expand(1, 10**6, 10**6)}, path)
    assert str(path) in refused(read_weights, path, match="tensor pos_embed .* more than what the file holds")


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_tensors_without_plain_memory(tmp_path, kind):
    tensor = torch.zeros(10**6, 10**6, device="meta") if kind == "meta" else torch.zeros(3, 3).to_sparse()
    torch.save({"a": tensor}, tmp_path / "w.pth")
    assert "w.pth" in refused(read_weights, tmp_path / "w.pth")


def vit():
    return MoEVisionTransformer(img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=2, moe_blocks=())


def npz_member(shape, data=b"", dtype="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def test_npz_with_code(tmp_path, mark):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("embedding/kernel.npy", npz_member((1,), pickle.dumps([Evil(mark)]), "|O"))
    refused(load_weights, vit(), path, match="Python objects, which are never unpickled")


def test_npz_bomb(tmp_path):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embedding/kernel.npy", npz_member((1 << 23,), bytes(1 << 25)))
    assert path.stat().st_size < 1 << 20
    refused(load_weights, vit(), path, match="would grow from .* to 33,.* bytes, more than 100 times: not unpacked")


def test_npz_that_claims_a_large_array(tmp_path):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("embedding/kernel.npy", npz_member((HUGE, HUGE), b"1234"))
    refused(load_weights, vit(), path, match=r"claims shape \(100000, 100000\)")


def checkpoint(folder, mark=None, **state):
    save_checkpoint(folder, model=torch.nn.Linear(2, 2), config={}, progress={"step": 1, "total_steps": 2})
    if mark is not None or state:
        torch.save(state or {"optimizer": Evil(mark)}, folder / "state.pt")
        manifest = json.loads((folder / "manifest.json").read_text())
        import hashlib

        manifest["sha256"]["state.pt"] = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_checkpoint_with_code_and_a_right_checksum(tmp_path, mark):
    folder = checkpoint(tmp_path / "last", mark)
    assert verify_checkpoint(folder) == 1
    refused(load_state, folder, match="state.pt cannot be read")


@pytest.mark.parametrize(
    "manifest",
    [
        b"[]",
        b"[" * HUGE,
        b"null",
        b'{"format": "m3bsr checkpoint 1", "step": "x", "sha256": {}}',
        b"\xff\xfe",
        b"1e999",
    ],
)
def test_a_hostile_manifest_gives_way_to_a_good_checkpoint(tmp_path, manifest):
    checkpoint(tmp_path / "previous")
    (checkpoint(tmp_path / "last") / "manifest.json").write_bytes(manifest)
    refused(verify_checkpoint, tmp_path / "last", match="damaged")
    newest, complaints = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "previous" and len(complaints) == 1


def test_state_with_other_content_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="state.pt has no scheduler"):
        load_state(checkpoint(tmp_path / "last", optimizer={}))


def test_safetensors_with_a_lying_header(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    data = bytearray(path.read_bytes())
    path.write_bytes(struct.pack("<Q", 2**40) + bytes(data[8:]))
    refused(read_weights, path, match="safely")
    header = json.dumps({"a": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4 * HUGE * HUGE]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(read_weights, path, match="safely")


# archives


def make_tar(path, *members, compress="gz"):
    with tarfile.open(path, f"w:{compress}") as archive:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.linkname = content.decode()
                archive.addfile(member)
    return path


FILE, LINK, HARD, DEVICE = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE


@pytest.mark.parametrize(
    "members",
    [
        [("../out.txt", FILE, b"x")],
        [("a/../../out.txt", FILE, b"x")],
        [("/tmp/m3bsr-out.txt", FILE, b"x")],
        [("a", LINK, b".."), ("a/out.txt", FILE, b"x")],
        [("a", LINK, b"/etc/passwd")],
        [("a", HARD, b"../../out.txt")],
        [("a", DEVICE, b"")],
    ],
    ids=["dots", "dots within", "absolute", "through a link", "link", "hard link", "device"],
)
def test_tar_that_climbs_out(tmp_path, members):
    archive = make_tar(tmp_path / "a.tgz", ("good.txt", FILE, b"good"), *members)
    target = tmp_path / "deep" / "target"
    refused(unpack, archive, target, match="nothing was unpacked")
    assert not target.exists() and {path.name for path in tmp_path.iterdir()} == {"a.tgz"}


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "C:\\out.txt", "a\\..\\..\\out.txt", "link"])
def test_zip_that_climbs_out(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good.txt", "good")
        member = zipfile.ZipInfo(name)
        if name == "link":
            member.external_attr = 0o120777 << 16
        archive.writestr(member, "../../etc")
    refused(unpack, tmp_path / "a.zip", tmp_path / "target", match="nothing was unpacked")
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip"}


def test_archives_that_are_bombs(tmp_path):
    make_tar(tmp_path / "a.tgz", ("zeros", FILE, bytes(1 << 25)))
    refused(unpack, tmp_path / "a.tgz", tmp_path / "target", match="would grow from")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(1 << 25))
    refused(unpack, tmp_path / "a.zip", tmp_path / "target", match="would grow from")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x05\x06" + bytes(18), b"\x1f\x8b" + bytes(40)])
def test_what_is_no_archive(tmp_path, content):
    (tmp_path / "a.tgz").write_bytes(content)
    if content[:2] == b"PK":
        unpack(tmp_path / "a.tgz", tmp_path / "target")  # an empty zip file
    else:
        refused(unpack, tmp_path / "a.tgz", tmp_path / "target", match="cannot unpack")
    refused(unpack, tmp_path / "none.tgz", tmp_path / "target", match="no such archive")


def test_good_archives_are_unpacked(tmp_path):
    make_tar(tmp_path / "a.tgz", ("x/a.txt", FILE, b"one"))
    unpack(tmp_path / "a.tgz", tmp_path / "tar")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/a.txt", "two")
    unpack(tmp_path / "a.zip", tmp_path / "zip")
    assert (tmp_path / "tar/x/a.txt").read_text() == "one" and (tmp_path / "zip/x/a.txt").read_text() == "two"


def test_prepare_unpacks_downloads_through_it(load, tmp_path, monkeypatch, capsys):
    """torchvision's download of a benchmark without a checksum, the archive replaced by one that climbs out."""
    prepare = load("datasets/classification/prepare.py")
    import torchvision.datasets.utils as utils

    def download_url(url, root, filename=None, md5=None):
        make_tar(Path(root) / (filename or url.rpartition("/")[2]), ("../../out.txt", FILE, b"x"))

    monkeypatch.setattr(utils, "download_url", download_url)
    assert prepare.main(["aircraft", "--root", str(tmp_path / "deep" / "root")]) == 2
    error = capsys.readouterr().err.strip()
    assert "out.txt" in error and "nothing was unpacked" in error and "\n" not in error
    assert not (tmp_path / "out.txt").exists() and not (tmp_path / "deep" / "out.txt").exists()


# pictures and arrays


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def ppm(width, height):
    return b"P6 %d %d 255\n" % (width, height) + bytes(100)


def bmp(width, height):
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "BMP")
    content = bytearray(file.getvalue())
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


@pytest.mark.parametrize("size", [(HUGE, HUGE), (20_000, 6_000), (2**31 - 1, 1)])
@pytest.mark.parametrize("picture", [png, ppm, bmp])
def test_a_huge_picture_is_refused_by_its_header(tmp_path, monkeypatch, picture, size):
    """By our limit: Pillow's own is higher, and any other library may have lifted it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "huge"
    path.write_bytes(picture(*size))
    assert str(path) in refused(read_image, path, match="pixels are more than the 100,000,000 allowed")


def test_a_picture_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\nshowpage\n")
    with Image.open(path) as image:
        assert image.format == "EPS"
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    refused(read_image, path, match="cannot identify image file")


def test_arrays(tmp_path, mark):
    path = tmp_path / "a.npy"
    path.write_bytes(npz_member((1,), pickle.dumps([Evil(mark)]), "|O"))
    refused(read_array, path, 1, match="cannot read array")
    path.write_bytes(pickle.dumps(Evil(mark)))
    refused(read_array, path, 1, match="cannot read array")
    for side in (HUGE, 10_000):  # more than there is memory, and as much as would be given
        path.write_bytes(npz_member((side, side), b"1234"))
        refused(read_array, path, 1, match="cannot read array")


def test_matlab_bomb(tmp_path):
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"LabelMap": np.zeros((10_001, 10_000), np.uint8)}, do_compression=True)
    assert path.stat().st_size < 1 << 20
    refused(read_matlab, path, "LabelMap", most=400 * 2**20, match="more than the 100,000,000 values allowed")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a\\b", ".hidden", "a\0b"])
def test_split_files_that_climb_out(tmp_path, name):
    (tmp_path / "train.txt").write_text(f"good\n{name}\n")
    refused(read_names, tmp_path / "train.txt", match="line 2: .* is no plain file name")
