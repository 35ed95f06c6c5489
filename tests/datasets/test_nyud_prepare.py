"""From MATLAB files to NYUD_MT: a tiny official-looking file goes through the whole command; what can go wrong does."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from m3bsr.data import NYUD
from m3bsr.utils.constants import IGNORE

SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "nyud" / "prepare.py"
H, W, N = 48, 64, 5
CLASSES = [3, 1, 2, 40, 5]  # of raw labels 1 to 5


def _load():
    spec = importlib.util.spec_from_file_location("nyud_prepare", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nyud_prepare"] = module
    spec.loader.exec_module(module)
    return module


prepare = _load()
import nyud_convert  # noqa: E402  (its folder is on the path once prepare.py is loaded)


def _rays(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    fx, fy, cx, cy = np.array(nyud_convert.KINECT) * np.array([width / 640, height / 480] * 2)
    v, u = np.mgrid[:height, :width]
    return (u - cx) / fx, (v - cy) / fy


def _plane_depth(normal, distance: float, height: int = H, width: int = W) -> np.ndarray:
    """Depth of the points X with ``normal . X = -distance``, infinite where the plane is behind the camera."""
    x, y = _rays(height, width)
    slope = normal[0] * x + normal[1] * y + normal[2]
    return np.where(slope < 0, -distance / np.where(slope < 0, slope, -1), np.inf)


@pytest.fixture
def official(tmp_path):
    """Five frames of a wall 3 m away with two boxes of one class side by side, in MATLAB's order of axes."""
    labels = np.full((N, H, W), 2, np.uint16)
    labels[:, 10:30, 10:30], labels[:, 10:30, 30:50] = 4, 4
    labels[:, 40:, :20] = 0
    instances = np.ones((N, H, W), np.uint8)
    instances[:, 10:30, 30:50] = 2
    depths = np.broadcast_to(_plane_depth((0, 0, -1), 3.0), (N, H, W)).astype(np.float32)
    raw = depths.copy()
    raw[:, :6] = 0
    images = np.random.default_rng(0).integers(0, 256, (N, H // 8, W // 8, 3), dtype=np.uint8)
    images = images.repeat(8, 1).repeat(8, 2)
    mat = tmp_path / "labeled.mat"
    with h5py.File(mat, "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        for key, array in {"labels": labels, "instances": instances, "depths": depths, "rawDepths": raw}.items():
            file[key] = array.transpose(0, 2, 1)
    scipy.io.savemat(tmp_path / "splits.mat", {"trainNdxs": [[1], [3], [4]], "testNdxs": [[2], [5]]})
    scipy.io.savemat(tmp_path / "map.mat", {"mapClass": np.array([CLASSES], np.uint8)})
    return SimpleNamespace(folder=tmp_path, mat=mat, images=images, labels=labels, out=tmp_path / "sets" / "NYUD_MT")


def _arguments(official, *extra: str, classes=("--class-mapping", "map.mat")) -> list[str]:
    files = ["--mat", str(official.mat), "--splits", str(official.folder / "splits.mat")]
    files += [classes[0], str(official.folder / classes[1]), "--out", str(official.out)]
    return [*files, "--checksum", "none", "--workers", "1", "--quiet", *extra]


def test_every_frame_arrives_upright_with_its_labels(official, capsys):
    assert prepare.main(_arguments(official)) == 0
    assert "5 frames" in capsys.readouterr().out
    train, val = (NYUD(official.out, split, NYUD.known_tasks) for split in ("train", "val"))
    assert train.names == ["0001", "0003", "0004"] and val.names == ["0002", "0005"]
    sample = val[1]
    assert np.abs(sample["image"].permute(1, 2, 0).numpy().astype(int) - official.images[4]).mean() < 15  # JPEG
    assert sample["semseg"][0, 20, 20] == CLASSES[3] - 1 and sample["semseg"][0, 35, 60] == CLASSES[1] - 1
    assert (sample["semseg"][0, 40:, :20] == IGNORE).all()
    assert sample["depth"].sub(3).abs().max() < 1e-5
    assert (sample["normals"][:, 0] == IGNORE).all()  # painted-in depth has no normals
    assert sample["normals"][:, 20, 20].tolist() == pytest.approx([0, 0, -1], abs=1e-5)
    assert sample["edge"][0, 20].sum() == 3  # left, between the two instances of one class, right


def test_a_table_of_classes_or_the_classes_themselves_give_the_same(official):
    assert prepare.main(_arguments(official)) == 0
    table = np.array([0, *CLASSES], np.uint8)
    scipy.io.savemat(official.folder / "labels40.mat", {"labels40": table[official.labels].transpose(1, 2, 0)})
    first, official.out = official.out, official.folder / "other"
    assert prepare.main(_arguments(official, "--workers", "2", classes=("--labels40", "labels40.mat"))) == 0
    for name in ("0001", "0002", "0005"):
        one, two = (np.array(Image.open(out / "segmentation" / f"{name}.png")) for out in (first, official.out))
        assert (one == two).all()


def test_raw_depth_keeps_its_holes(official):
    assert prepare.main(_arguments(official, "--depth", "raw")) == 0
    depth = NYUD(official.out, "val", ("depth",))[0]["depth"]
    assert (depth[0, :6] == IGNORE).all() and depth[0, 6:].sub(3).abs().max() < 1e-5


def test_repeating_does_nothing_and_nothing_of_others_is_touched(official, capsys):
    official.out.mkdir(parents=True)
    (official.out / "mine.txt").write_text("keep")
    assert prepare.main(_arguments(official, "--force")) == 2
    assert "not made by prepare.py" in capsys.readouterr().err
    assert (official.out / "mine.txt").read_text() == "keep"
    (official.out / "mine.txt").unlink()
    assert prepare.main(_arguments(official)) == 0
    before = (official.out / "manifest.json").stat().st_mtime_ns
    assert prepare.main(_arguments(official)) == 0
    assert "there already" in capsys.readouterr().out
    assert (official.out / "manifest.json").stat().st_mtime_ns == before
    assert prepare.main(_arguments(official, "--depth", "raw")) == 2
    assert "--force" in capsys.readouterr().err
    assert prepare.main(_arguments(official, "--depth", "raw", "--force")) == 0
    assert json.loads((official.out / "manifest.json").read_text())["arguments"]["depth"] == "raw"


def test_a_failed_replacement_leaves_the_old_set(official, capsys, monkeypatch):
    assert prepare.main(_arguments(official)) == 0
    before = {path: path.stat().st_mtime_ns for path in official.out.rglob("*") if path.is_file()}
    rename = Path.rename

    def full_disk(path, target):
        if path.suffix == ".tmp" and ".old" not in path.name:
            raise OSError("no space left")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full_disk)
    assert prepare.main(_arguments(official, "--depth", "raw", "--force")) == 2
    assert "no space left" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in official.out.rglob("*") if path.is_file()} == before
    assert [path.name for path in official.out.parent.iterdir()] == ["NYUD_MT"]


def test_a_link_to_another_disk_stays_a_link(official):
    disk = official.folder / "disk"
    disk.mkdir()
    official.out.parent.mkdir(parents=True)
    official.out.symlink_to(disk, target_is_directory=True)
    for extra in ((), ("--depth", "raw", "--force")):
        assert prepare.main(_arguments(official, *extra)) == 0
        assert official.out.is_symlink() and len(NYUD(official.out, "train", ("depth",))) == 3
    assert not list(official.folder.glob("*.tmp"))


def test_checksum_is_compared_and_recorded(official, capsys):
    digest = hashlib.sha256(official.mat.read_bytes()).hexdigest()
    assert prepare.main(_arguments(official, "--checksum", "known")) == 2
    error = capsys.readouterr().err
    assert "expected 520609c5" in error and "download it again" in error and not official.out.exists()
    assert prepare.main(_arguments(official, "--checksum", "md5:123")) == 2
    assert "32 hex digits" in capsys.readouterr().err
    assert prepare.main(_arguments(official, "--checksum", f"sha256:{digest.upper()}")) == 0
    assert json.loads((official.out / "manifest.json").read_text())["mat_checksum"] == f"sha256:{digest}"


def _without(key):
    def spoil(official):
        with h5py.File(official.mat, "r+") as file:
            del file[key]

    return spoil


def _replaced(key, array):
    def spoil(official):
        _without(key)(official)
        with h5py.File(official.mat, "r+") as file:
            file[key] = array

    return spoil


def _saved(name, **content):
    return lambda official: scipy.io.savemat(official.folder / name, content)


def _bytes(name, content):
    return lambda official: (official.folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda official: official.mat.unlink(), "no such file: .*labeled.mat; .*README"),
        (_bytes("labeled.mat", b"MATLAB 5.0"), "labeled.mat is no MATLAB 7.3"),
        (_without("depths"), "labeled.mat has no depths; it holds images, instances, labels, rawDepths"),
        (_replaced("depths", np.zeros((N, H, W))), "depths has shape .5, 48, 64.*expected .5, 64, 48"),
        (_replaced("labels", np.full((N, W, H), 77, np.uint16)), "frame 0001: label 77 has no class.*1 to 5"),
        (_bytes("splits.mat", b"not a file of MATLAB at all, whatever its name"), "cannot read .*splits.mat"),
        (_saved("splits.mat", trainNdxs=[[1]]), "splits.mat has no testNdxs; it holds trainNdxs"),
        (_saved("splits.mat", trainNdxs=[[1]], testNdxs=[[6]]), "testNdxs names number 6, but there are 5 frames"),
        (_saved("splits.mat", trainNdxs=[[1]], testNdxs=[[]]), "testNdxs names no frames"),
        (_saved("splits.mat", trainNdxs=[[1], [2]], testNdxs=[[2]]), "frame 2 is in trainNdxs and in testNdxs"),
        (_saved("map.mat", mapClass=np.array([[1, 41]], np.uint8)), "mapClass holds 41"),
        (_saved("map.mat", mapClass="wall"), "mapClass holds <U4 values"),
    ],
)
def test_faulty_input_is_one_line_and_leaves_nothing_behind(official, capsys, spoil, message):
    spoil(official)
    assert prepare.main(_arguments(official)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert not official.out.parent.exists() or not any(official.out.parent.iterdir())


@pytest.mark.parametrize("normal", [(0, 0, -1), (0, -1, 0), (0.6, 0, -0.8), (-0.48, 0.64, -0.6), (1, 0, 0)])
def test_normals_of_a_plane_are_exact(normal):
    depth = _plane_depth(normal, 1.5, 240, 320)
    depth = np.where(depth < 8, depth, 0).astype(np.float32)
    normals = nyud_convert.normals_from_depth(depth)
    found = np.linalg.norm(normals, axis=-1) > 0
    assert not found[depth == 0].any() and found[depth > 0].mean() > 0.9
    assert np.abs(normals[found] - np.array(normal)).max() < 1e-4


def test_normals_do_not_bend_across_a_jump_in_depth_and_bear_sensor_noise():
    height, width = 240, 320
    normal = np.array([0.6, 0, -0.8])
    depth = np.where(np.arange(width) < width // 2, 1.5, _plane_depth(normal, 3.0, height, width))
    near_jump = nyud_convert.normals_from_depth(depth.astype(np.float32))[:, width // 2 - 3 : width // 2]
    assert np.abs(near_jump - np.array([0, 0, -1])).max() < 1e-3
    disparity = 43.5 / _plane_depth(normal, 2.0, height, width)
    noise = np.random.default_rng(0).normal(0, 0.5, disparity.shape)
    noisy = 43.5 / (np.round(disparity * 8 + noise) / 8)
    normals = nyud_convert.normals_from_depth(noisy.astype(np.float32))
    angle = np.degrees(np.arccos(np.clip(normals @ normal, -1, 1)))
    assert np.median(angle) < 4


def test_edges_are_thin_and_narrow_gaps_give_one():
    regions = np.full((480, 640), 1)
    regions[:, 300:] = 2
    regions[:, 296:304] = 0
    edge = nyud_convert.edges_from_regions(regions)
    assert edge.dtype == np.uint8 and (edge.sum(axis=1)[1:-1] == 1).all()
    assert np.flatnonzero(edge[200])[0] in range(296, 304)
    wide = np.where(np.abs(np.arange(640) - 300) < 40, 0, regions)
    assert (nyud_convert.edges_from_regions(wide).sum(axis=1)[1:-1] == 2).all()
    assert nyud_convert.edges_from_regions(np.zeros((48, 64), int)).sum() == 0
