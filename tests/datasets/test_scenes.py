"""The ray-cast rooms: exact labels, determinism, the view in a mirror, and the files that the loaders read."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "scenes" / "make_scenes.py"
H, W = 60, 80


def _load():
    spec = importlib.util.spec_from_file_location("make_scenes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_scenes"] = module
    spec.loader.exec_module(module)
    return module


scenes = _load()
VIEWS = [(0, "source", 3), (0, "target", 1), (7, "source", 0), (7, "target", 4)]


def _view(seed: int, domain: str, index: int, **camera) -> dict[str, np.ndarray]:
    return scenes.render_scene(seed, domain, index, H, W, **camera)


@pytest.mark.parametrize(("seed", "domain", "index"), VIEWS)
def test_labels_have_the_promised_types_and_ranges(seed, domain, index):
    view = _view(seed, domain, index)
    assert view["image"].shape == (H, W, 3) and view["image"].dtype == np.uint8
    assert view["segmentation"].dtype == np.uint8 and view["segmentation"].max() <= 40
    assert view["depth"].dtype == np.float32 and view["depth"].min() > 0.05 and view["depth"].max() < 12
    assert view["normals"].dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(view["normals"], axis=-1), 1.0, atol=1e-5)
    assert view["edge"].dtype == np.uint8 and set(np.unique(view["edge"])) == {0, 1}
    assert 10 < view["image"].mean() < 245 and view["image"].std() > 10
    assert {1, 2} <= set(np.unique(view["segmentation"]))  # a room has walls and a floor


def _points(view: dict[str, np.ndarray], focal: float) -> np.ndarray:
    v, u = np.mgrid[0:H, 0:W]
    z = view["depth"].astype(np.float64)
    return np.stack([(u + 0.5 - W / 2) / (focal * W) * z, (v + 0.5 - H / 2) / (focal * W) * z, z], -1)


@pytest.mark.parametrize(("seed", "domain", "index"), VIEWS)
def test_normals_are_those_of_the_depth_map_and_face_the_camera(seed, domain, index):
    """Cross product of the neighbours' points against the stored normal, wherever a plane covers the neighbourhood."""
    from scene_rooms import build_room, generator

    view = _view(seed, domain, index)
    point = _points(view, build_room(domain, generator(seed, domain, index)).camera.focal)
    assert (np.einsum("hwi,hwi->hw", point, view["normals"]) < 0).all()
    across, along = point[1:-1, 2:] - point[1:-1, :-2], point[2:, 1:-1] - point[:-2, 1:-1]
    measured = np.cross(along, across)
    measured /= np.linalg.norm(measured, axis=-1, keepdims=True)
    stored, instance = view["normals"][1:-1, 1:-1], view["instance"]
    neighbours = [(slice(1, -1), slice(2, None)), (slice(1, -1), slice(None, -2))]
    neighbours += [(slice(2, None), slice(1, -1)), (slice(None, -2), slice(1, -1))]
    flat = np.ones(stored.shape[:2], dtype=bool)
    for rows, columns in neighbours:
        flat &= (np.abs(view["normals"][rows, columns] - stored) < 1e-6).all(-1)
        flat &= instance[rows, columns] == instance[1:-1, 1:-1]
    walls = flat & (instance[1:-1, 1:-1] <= 6)  # furniture may have two parallel planes at different depths
    assert walls.mean() > 0.3
    cosine = np.einsum("hwi,hwi->hw", measured, stored)
    assert cosine[walls].min() > 0.9999
    assert np.median(cosine[flat]) > 0.9999


@pytest.mark.parametrize(("seed", "domain", "index"), VIEWS)
def test_edges_lie_where_the_instance_changes_and_nowhere_else(seed, domain, index):
    view = _view(seed, domain, index)
    instance, edge = view["instance"], view["edge"].astype(bool)
    padded = np.pad(instance, 1, mode="edge")
    shifted = [padded[1:-1, 2:], padded[1:-1, :-2], padded[2:, 1:-1], padded[:-2, 1:-1]]
    changes = np.any([other != instance for other in shifted], axis=0)
    assert not (edge & ~changes).any()
    for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):  # every change is marked, on one side
        border = instance[a] != instance[b]
        assert (edge[a] | edge[b])[border].all()
    assert edge.sum() < changes.sum()
    assert 0.01 < edge.mean() < 0.35


@pytest.mark.parametrize(("seed", "domain", "index"), VIEWS)
def test_a_mirrored_room_gives_the_flipped_labels(seed, domain, index):
    plain, mirrored = _view(seed, domain, index), _view(seed, domain, index, mirrored=True)
    for key in ("segmentation", "instance", "edge"):
        assert (plain[key][:, ::-1] != mirrored[key]).mean() < 1e-3, key
    same = plain["instance"][:, ::-1] == mirrored["instance"]
    np.testing.assert_allclose(plain["depth"][:, ::-1][same], mirrored["depth"][same], rtol=1e-5)
    flipped = plain["normals"][:, ::-1] * np.float32([-1, 1, 1])
    assert (np.abs(flipped - mirrored["normals"]).max(-1) > 1e-4).mean() < 2e-3
    assert np.abs(plain["image"][:, ::-1].astype(int) - mirrored["image"]).mean() < 0.5


def test_moving_the_camera_forward_shortens_the_wall_and_rolling_it_turns_the_normals():
    plain, near = _view(0, "source", 3), _view(0, "source", 3, camera_shift=(0.0, 0.0, 0.1))
    y, x = H // 2, W // 2
    assert plain["segmentation"][2, x] == near["segmentation"][2, x]
    assert not np.array_equal(plain["depth"], near["depth"])
    facing = plain["normals"][..., 2] < -0.999
    if facing[y, x] and plain["instance"][y, x] == near["instance"][y, x]:
        assert plain["depth"][y, x] - near["depth"][y, x] == pytest.approx(0.1, abs=0.02)
    rolled = _view(0, "source", 3, roll=180.0)  # half a turn: the picture upside down, x and y of normals negated
    assert (rolled["segmentation"] != plain["segmentation"][::-1, ::-1]).mean() < 1e-3
    turned = plain["normals"][::-1, ::-1] * np.float32([-1, -1, 1])
    assert (np.abs(rolled["normals"] - turned).max(-1) > 1e-4).mean() < 2e-3
    with_zoom = scenes.render_scene(0, "source", 3, H, W, zoom=2.0)["depth"]
    full = scenes.render_scene(0, "source", 3, 2 * H, 2 * W)["depth"][H // 2 : -H // 2, W // 2 : -W // 2]
    np.testing.assert_allclose(with_zoom, full, rtol=1e-5)


def test_scenes_depend_on_seed_domain_and_index_only():
    first = _view(5, "source", 2)
    _view(5, "source", 9)
    again = _view(5, "source", 2)
    for key in first:
        np.testing.assert_array_equal(first[key], again[key], err_msg=key)
    for other in (_view(6, "source", 2), _view(5, "target", 2), _view(5, "source", 3)):
        assert (other["instance"] != first["instance"]).mean() > 0.05


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_nyud_layout_is_complete_and_independent_of_count_and_workers(tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    scenes.make_scenes(few, train=2, val=1, domain="target", size=(48, 64), seed=3, quiet=True)
    scenes.make_scenes(many, train=3, val=2, domain="target", size=(48, 64), seed=3, workers=2, quiet=True)
    a, b = _files(few), _files(many)
    for name in (few / "gt_sets" / "train.txt").read_text().split() + (few / "gt_sets" / "val.txt").read_text().split():
        files = [f"images/{name}.jpg", f"segmentation/{name}.png"]
        files += [f"{task}/{name}.npy" for task in ("depth", "normals", "edge")]
        for file in files:
            assert a[file] == b[file], file
        assert np.array(Image.open(few / files[0])).shape == (48, 64, 3)
        assert np.array(Image.open(few / files[1])).max() <= 40
        assert np.load(few / files[2]).shape == (48, 64) and np.load(few / files[2]).dtype == np.float32
        assert np.load(few / files[3]).shape == (48, 64, 3) and np.load(few / files[4]).dtype == np.uint8
    assert len(a) == 3 * 5 + 4  # two splits, the class names, the manifest
    names = (few / "class_names.txt").read_text().splitlines()
    assert len(names) == 40 and names[0] == "wall" and names[21] == "ceiling"
    assert not list(tmp_path.glob("*.tmp"))


def test_the_folder_is_whole_or_not_there_and_never_overwritten_by_accident(tmp_path, monkeypatch, capsys):
    out = tmp_path / "set"
    command = ["--out", str(out), "--train", "1", "--val", "1", "--size", "32x48", "--workers", "1", "--quiet"]
    monkeypatch.setattr(scenes, "make_one", lambda root, job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scenes.main(command)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert scenes.main(command) == 0
    made = _files(out)
    assert json.loads(made["manifest.json"])["arguments"]["size"] == [32, 48]
    assert scenes.main(command) == 0 and "nothing to do" in capsys.readouterr().out
    assert scenes.main([*command, "--seed", "1"]) == 2
    assert "another seed" in capsys.readouterr().err and _files(out) == made
    assert scenes.main([*command, "--seed", "1", "--force"]) == 0 and _files(out) != made
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "holiday.jpg").write_text("precious")
    assert scenes.main(["--out", str(mine), "--force", "--quiet"]) == 2
    assert "not made by make_scenes.py" in capsys.readouterr().err and (mine / "holiday.jpg").exists()
    assert scenes.main(["--out", str(tmp_path / "x"), "--size", "120"]) == 2
    assert "height x width" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pascal(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pascal") / "PASCAL_MT"
    scenes.make_scenes(out, train=6, val=4, domain="source", size=(72, 96), layout="PASCAL_MT", quiet=True)
    return out


def _mat(path: Path) -> dict:
    return pytest.importorskip("scipy.io").loadmat(path)


def test_pascal_layout_is_complete(pascal):
    for split, count in (("train", 6), ("val", 4)):
        names = (pascal / "ImageSets" / "Context" / f"{split}.txt").read_text().split()
        classes = json.loads((pascal / "ImageSets" / "Parts" / f"{split}.txt").read_text())
        assert len(names) == count and list(classes) == names
        for name in names:
            assert np.array(Image.open(pascal / "JPEGImages" / f"{name}.jpg")).shape == (72, 96, 3)
            label_map = _mat(pascal / "pascal-context" / "trainval" / f"{name}.mat")["LabelMap"]
            assert label_map.shape == (72, 96) and label_map.min() >= 1 and label_map.max() <= 459
            found = [pascal / "semseg" / folder / f"{name}.png" for folder in ("VOC12", "pascal-context")]
            (semseg,) = [np.array(Image.open(path)) for path in found if path.exists()]
            assert set(np.unique(semseg)) <= {*range(21), 255}
            normals = np.array(Image.open(pascal / "normals_distill" / f"{name}.png")) / 127.5 - 1
            np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1.0, atol=0.02)
            sal = np.array(Image.open(pascal / "sal_distill" / f"{name}.png"))
            assert set(np.unique(sal)) <= {0, 255}
            objects = _mat(pascal / "human_parts" / f"{name}.mat")["anno"][0][0]["objects"]
            assert [int(o["class_ind"][0, 0]) for o in objects.ravel()] == classes[name]
            if 15 in classes[name]:
                assert ((sal > 0) & (semseg > 0)).any()
    assert list((pascal / "semseg" / "VOC12").iterdir()) and list((pascal / "semseg" / "pascal-context").iterdir())


def test_the_parts_on_disk_are_those_of_the_figures(pascal):
    from scene_figures import SIX_PARTS
    from scene_layouts import PART_NAMES

    seen = set()
    for index in range(6):
        view = scenes.render_figures(0, "source", index, 72, 96)
        objects = _mat(pascal / "human_parts" / f"source_train_{index:05d}.mat")["anno"][0][0]["objects"].ravel()
        parts = np.zeros((72, 96), dtype=np.uint8)
        for thing in objects:
            assert (view["semseg"][thing["mask"].astype(bool)] == int(thing["class_ind"][0, 0])).all()
            for part in thing["parts"].ravel() if int(thing["class_ind"][0, 0]) == 15 else ():
                assert not (part["mask"] > thing["mask"]).any()
                parts[part["mask"].astype(bool)] = SIX_PARTS[PART_NAMES.index(str(part["part_name"][0]))]
        np.testing.assert_array_equal(parts, view["human_parts"])
        np.testing.assert_array_equal(parts > 0, view["semseg"] == 15)
        seen |= set(np.unique(parts).tolist())
    assert seen == {0, 1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("index", [0, 1, 4])  # a room, a meadow, and whatever comes fifth
def test_a_mirrored_picture_with_figures_is_the_flipped_one(index):
    plain = scenes.render_figures(0, "target", index, H, W)
    mirrored = scenes.render_figures(0, "target", index, H, W, mirrored=True)
    for key in ("semseg", "human_parts", "saliency", "context"):
        assert (plain[key][:, ::-1] != mirrored[key]).mean() < 1e-3, key
    flipped = plain["normals"][:, ::-1] * np.float32([-1, 1, 1])
    assert (np.abs(flipped - mirrored["normals"]).max(-1) > 1e-4).mean() < 2e-3


def test_a_picture_without_objects_still_has_an_annotation(tmp_path):
    from scene_layouts import annotation

    nothing = np.zeros((4, 5), dtype=np.uint8)
    anno, classes = annotation("empty", {"instance": nothing + 1, "semseg": nothing, "part": nothing})
    pytest.importorskip("scipy.io").savemat(tmp_path / "a.mat", {"anno": anno})
    assert classes == [] and _mat(tmp_path / "a.mat")["anno"][0][0]["objects"].size == 0
