"""PASCAL_MT from an archive: checked, placed whole or not at all, gone on with after a stop."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3bsr.cli import prepare as shared
from m3bsr.data import PascalContext


@pytest.fixture
def prepare(load):
    return load("datasets/pascal/prepare.py")


def draw(root: Path) -> None:
    """Two pictures to train and one to validate, with semantic labels and saliency."""
    for folder in ("JPEGImages", "semseg/VOC12", "sal_distill", "ImageSets/Context"):
        (root / folder).mkdir(parents=True)
    for name in ("a", "b", "c"):
        pixels = np.full((12, 20), 7, np.uint8)
        Image.fromarray(np.stack([pixels] * 3, -1)).save(root / "JPEGImages" / f"{name}.jpg")
        for folder in ("semseg/VOC12", "sal_distill"):
            Image.fromarray(pixels).save(root / folder / f"{name}.png")
    (root / "ImageSets" / "Context" / "train.txt").write_text("a\nb\n")
    (root / "ImageSets" / "Context" / "val.txt").write_text("c\n")


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, folder.name)
    return archive


@pytest.fixture
def archive(tmp_path):
    draw(tmp_path / "source" / "PASCALContext")
    return pack(tmp_path / "source" / "PASCALContext", tmp_path / "PASCAL_MT.tgz")


def run(prepare, archive: Path, *extra: str) -> tuple[int, Path]:
    out = archive.parent / "sets" / "PASCAL_MT"
    return prepare.main(["--archive", str(archive), "--out", str(out), "--workers", "0", *extra]), out


def test_an_archive_becomes_a_folder_that_the_loader_reads(prepare, archive, capsys):
    status, out = run(prepare, archive)
    assert status == 0
    said = capsys.readouterr().out
    assert "2 train, 1 val pictures; the published set has 4998 and 5105; tasks: semseg, saliency" in said
    assert PascalContext(out, "train", ("semseg", "saliency"))[1]["semseg"].unique().tolist() == [7]
    assert [path.name for path in out.parent.iterdir()] == ["PASCAL_MT"]
    assert len(json.loads((out / "manifest.json").read_text())["arguments"]["archive_sha256"]) == 64
    assert run(prepare, archive)[0] == 0 and "is there already" in capsys.readouterr().out


def test_a_zip_file_without_a_folder_of_its_own_will_do(prepare, archive):
    source = archive.parent / "source" / "PASCALContext"
    packed = archive.with_suffix(".zip")
    with zipfile.ZipFile(packed, "w") as file:
        for path in source.rglob("*"):
            file.write(path, path.relative_to(source))
    status, out = run(prepare, packed)
    assert status == 0 and len(PascalContext(out, "val", ("semseg",))) == 1


def test_a_run_that_was_stopped_goes_on_and_unpacks_once(prepare, archive, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shared.check_data, "main", stop)
        status, out = run(prepare, archive)
    assert status == 130 and not out.exists() and (out.parent / "PASCAL_MT.partial").is_dir()
    monkeypatch.setattr(shared, "unpack", lambda *_, **__: pytest.fail("unpacked again"))
    assert run(prepare, archive)[0] == 0 and len(PascalContext(out, "train", ("semseg",))) == 2


def test_a_stop_while_unpacking_leaves_nothing_half_done_in_the_set(prepare, archive, monkeypatch):
    def half(archive, folder, progress):
        (folder / "JPEGImages").mkdir(parents=True)
        (folder / "ImageSets" / "Context").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shared, "unpack", half)
        assert run(prepare, archive)[0] == 130
    status, out = run(prepare, archive)
    assert status == 0 and not (out / "PASCAL_MT").exists() and len(PascalContext(out, "train", ("semseg",))) == 2


def test_faulty_files_are_listed_and_nothing_is_placed_unless_allowed(prepare, archive, capsys):
    source = archive.parent / "source" / "PASCALContext"
    picture = source / "JPEGImages" / "b.jpg"
    picture.write_bytes(picture.read_bytes()[:200])
    (source / "semseg" / "VOC12" / "c.png").unlink()
    pack(source, archive)
    status, out = run(prepare, archive)
    said, error = capsys.readouterr()
    assert status == 2 and not out.exists()
    assert "b.jpg" in said and "c.png" in said and "1 fault" in said
    assert len([line for line in error.splitlines() if line.startswith("error")]) == 1 and "--allow-faults" in error
    assert run(prepare, archive, "--allow-faults")[0] == 0 and out.is_dir()


def test_a_folder_in_use_is_replaced_only_if_it_was_made_here_and_asked_for(prepare, archive, capsys):
    _, out = run(prepare, archive)
    source = archive.parent / "source" / "PASCALContext"
    (source / "ImageSets" / "Context" / "train.txt").write_text("a\n")
    pack(source, archive)
    assert run(prepare, archive)[0] == 2 and "add --force" in capsys.readouterr().err
    assert run(prepare, archive, "--force")[0] == 0 and len(PascalContext(out, "train", ("semseg",))) == 1
    (out / "manifest.json").unlink()
    assert run(prepare, archive, "--force")[0] == 2 and "was not made by prepare.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such archive: .*PASCAL_MT.tgz; datasets/pascal/README.md"),
        (b"<html>404</html>", "cannot unpack .*PASCAL_MT.tgz"),
        ("elsewhere", "has no folder with JPEGImages and ImageSets/Context; it holds elsewhere"),
    ],
)
def test_what_is_no_such_archive_is_one_line(prepare, archive, capsys, content, message):
    if content is None:
        archive.unlink()
    elif isinstance(content, bytes):
        archive.write_bytes(content)
    else:
        (archive.parent / content).mkdir()
        pack(archive.parent / content, archive)
    status, out = run(prepare, archive)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert status == 2 and not out.exists() and len(errors) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(errors[0])
