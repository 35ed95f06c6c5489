"""The small Cityscapes from files like the official ones, and from an archive of arrays."""

from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3bsr.data import Cityscapes
from m3bsr.utils.constants import IGNORE

SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "cityscapes" / "prepare.py"
H, W, SCALE = 8, 16, 4
BASELINE, FOCAL = 0.2, 2000.0
IDS = {"road": 7, "parking": 9, "wall": 12, "pole": 17, "terrain": 22, "sky": 23, "rider": 25, "bicycle": 33, "none": 0}
CLASSES = [0, IGNORE, 1, 2, 3, 4, 5, 6, IGNORE]


def _load():
    spec = importlib.util.spec_from_file_location("cityscapes_prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cityscapes_prepare"] = module
    spec.loader.exec_module(module)
    return module


prepare = _load()
import cityscapes_convert  # noqa: E402  (its folder is on the path once prepare.py is loaded)


def enlarge(values: np.ndarray) -> np.ndarray:
    return values.repeat(SCALE, 0).repeat(SCALE, 1)


def name_of(split: str, city: str, number: int, package: str, ending: str) -> Path:
    return Path(package, split, city, f"{city}_{number:06d}_000019_{ending}")


@pytest.fixture
def official(tmp_path):
    """Three training and one validation frame, every pixel of the small arrays a block of 4x4."""
    rng, root = np.random.default_rng(0), tmp_path / "cityscapes"
    frames = [("train", "ulm", 0), ("train", "aachen", 1), ("train", "aachen", 0), ("val", "munster", 0)]
    for number, (split, city, sequence) in enumerate(frames):
        labels = rng.integers(0, 34, (H, W)).astype(np.uint8)
        labels[0, : len(IDS)] = list(IDS.values())
        disparity = rng.integers(0, 20_000, (H, W)).astype(np.uint16)
        disparity[0, :2] = 0, 256 * 64 + 1
        picture = np.full((H, W, 3), 10 * number, np.uint8)
        for package, ending, array in (
            ("leftImg8bit", "leftImg8bit.png", picture),
            ("gtFine", "gtFine_labelIds.png", labels),
            ("disparity", "disparity.png", disparity),
        ):
            path = root / name_of(split, city, sequence, package, ending)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(enlarge(array)).save(path)
        camera = root / name_of(split, city, sequence, "camera", "camera.json")
        camera.parent.mkdir(parents=True, exist_ok=True)
        camera.write_text(json.dumps({"extrinsic": {"baseline": BASELINE}, "intrinsic": {"fx": FOCAL}}))
    return root


def run(root: Path, *extra: str, source: str = "--official") -> tuple[int, Path]:
    out = root.parent / "sets" / "data"
    arguments = [source, str(root), "--out", str(out), "--size", str(H), str(W), "--workers", "0"]
    return prepare.main([*arguments, *extra]), out


def test_official_files_become_classes_and_inverse_depth_in_order(official, capsys):
    status, out = run(official)
    assert status == 0
    assert "3 train, 1 val samples; the published set has 2975 and 500; tasks: semseg, depth" in capsys.readouterr().out
    train = Cityscapes(out, "train", ("semseg", "depth"))
    assert [int(train[i]["image"].unique()) for i in range(3)] == [20, 10, 0]  # aachen 0, aachen 1, ulm 0
    sample = train[0]
    assert sample["image"].shape == (3, H, W) and sample["depth"].shape == (1, H, W)
    assert sample["semseg"][0, 0, : len(IDS)].tolist() == CLASSES
    assert sample["depth"][0, 0, 0] == IGNORE
    assert float(sample["depth"][0, 0, 1]) == pytest.approx(64 / (BASELINE * FOCAL))
    frames = json.loads((out / "manifest.json").read_text())["arguments"]["frames"]
    assert frames[0] == "train aachen_000000_000019"
    assert [path.name for path in out.parent.iterdir()] == ["data"]
    assert run(official)[0] == 0 and "is there already" in capsys.readouterr().out


def test_every_official_label_has_its_category():
    """The names and order of the categories are those of the loader; 19 labels are scored, 15 void."""
    table = cityscapes_convert.CLASS_TABLE
    assert np.bincount(table[table != IGNORE]).tolist() == [2, 3, 3, 2, 1, 2, 6]
    assert len(Cityscapes.class_names["semseg"]) == 7 and (table == IGNORE).sum() == 15


def test_a_run_that_was_stopped_goes_on_where_it_was(official, monkeypatch):
    made, convert = [], prepare.convert

    def stop(root, size, frame):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(frame.name)
        convert(root, size, frame)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "convert", stop)
        status, out = run(official)
    assert status == 130 and not out.exists()
    read = []
    monkeypatch.setattr(
        cityscapes_convert, "read_image", lambda path, of=cityscapes_convert.read_image: read.append(path) or of(path)
    )
    assert run(official)[0] == 0
    assert len(read) == 2 and not {path.name.removesuffix("_leftImg8bit.png") for path in read} & set(made)
    assert len(Cityscapes(out, "train", ("semseg", "depth"))) == 3 and not list(out.rglob("*.tmp"))


def test_one_task_needs_its_packages_only(official, capsys):
    for package in ("disparity", "camera"):
        (official / package).rename(official / f"no-{package}")
    assert run(official)[0] == 2
    assert "missing file" in (error := capsys.readouterr().err) and "and 5 more of 9" in error
    status, out = run(official, "--tasks", "semseg")
    assert status == 0 and Cityscapes.tasks_in(out) == ("semseg",)


def test_an_archive_of_arrays_is_checked_and_placed(official, capsys):
    _, made = run(official)
    archive = official.parent / "arrays.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in made.rglob("*.npy"):
            packed.write(path, Path("cityscapes") / path.relative_to(made))
    made.rename(made.parent / "first")
    status, out = run(archive, source="--archive")
    assert status == 0 and "3 train, 1 val samples" in capsys.readouterr().out
    assert len(Cityscapes(out, "train", ("semseg", "depth"))) == 3


def _camera(text: str):
    return lambda root: (root / name_of("val", "munster", 0, "camera", "camera.json")).write_text(text)


def _picture(package: str, ending: str, values: np.ndarray):
    return lambda root: Image.fromarray(values).save(root / name_of("val", "munster", 0, package, ending))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "leftImg8bit").rename(root / "x"), "no pictures like .*leftImg8bit/train/CITY"),
        (_camera("{}"), "munster_000000_000019_camera.json has no extrinsic.baseline"),
        (_camera('{"extrinsic": {"baseline": 0}, "intrinsic": {"fx": 1}}'), "camera.json: baseline and fx must be pos"),
        (
            _picture("gtFine", "gtFine_labelIds.png", np.full((32, 64), 34, np.uint8)),
            "labelIds.png: label 34 is out of",
        ),
        (_picture("disparity", "disparity.png", np.zeros((9, 9), np.uint16)), "disparity.png is 9x9 pixels, its pict"),
        (_picture("disparity", "disparity.png", np.full((32, 64), 65535, np.uint16)), None),
    ],
)
def test_faulty_sources_are_one_line(official, capsys, spoil, message):
    spoil(official)
    status, out = run(official)
    if message is None:  # a disparity of 256 pixels is 1.6 m away
        assert status == 0
        return
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert status == 2 and not out.exists() and len(error) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error[0])
