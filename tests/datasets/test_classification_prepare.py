"""prepare.py of the classification sets: what it downloads, what it says when it cannot."""

from __future__ import annotations

import pytest
from PIL import Image

from m3bsr.data import DATASETS


@pytest.fixture
def prepare(load):
    return load("datasets/classification/prepare.py")


def reader(calls, fails=False):
    class Reader:
        classes = ("x", "y")

        def __init__(self, root, download, **kwargs):
            calls.append((download, kwargs))
            if fails:
                raise RuntimeError("file not found or corrupted")

        def __len__(self):
            return 20

        def __getitem__(self, index):
            return Image.new("RGB", (8, 8)), 0

    return Reader


def test_every_split_is_downloaded_and_counted(prepare, monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(DATASETS["cifar10"], "reader", reader(calls))
    assert prepare.main(["cifar10", "--root", str(tmp_path / "data")]) == 0
    assert calls[:2] == [(True, {"train": True}), (True, {"train": False})]
    assert not any(download for download, _ in calls[2:])
    assert "cifar10: 18 train, 2 val, 20 test images" in capsys.readouterr().out


def test_a_failed_download_is_one_line(prepare, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(DATASETS["pets"], "reader", reader([], fails=True))
    assert prepare.main(["pets", "--root", str(tmp_path)]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and "Pets: file not found or corrupted; run the command again" in err[0]


def test_cars_cannot_be_downloaded(prepare, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["cars"])
    assert "invalid choice: 'cars'" in capsys.readouterr().err
