"""Classification data sets: folders, splits, recipes, errors."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from m3bsr.data import DATASETS, build_transform
from m3bsr.data.image_transforms import IMAGE_RECIPES, RandAugment
from m3bsr.data.labelled import LabelledImages, held_out, spread
from m3bsr.data.torchvision_sets import TorchvisionImages

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "cifar10_mini"
LABELLED = {name: kind for name, kind in DATASETS.items() if issubclass(kind, LabelledImages)}


def write_images(folder: Path, num: int, size: tuple[int, int] = (20, 12)) -> None:
    folder.mkdir(parents=True)
    for i in range(num):
        pixels = np.full((*size, 3), (i * 20) % 256, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, num in (("train", 4), ("val", 2)):
        for name in ("cat", "ant", "bee"):
            write_images(tmp_path / split / name, num)
    return tmp_path


def test_folder_gives_images_and_classes_in_alphabetical_order(folder):
    train = DATASETS["image_folder"](folder, "train")
    assert train.class_names == {"classification": ("ant", "bee", "cat")} and len(train) == 12
    sample = train[5]
    assert sample["image"].shape == (3, 20, 12) and sample["image"].dtype == torch.uint8
    assert sample["classification"] == 1 and sample["name"] == "train/bee/001.png"
    assert train.read_task_kwargs(folder) == {"classification": {"num_classes": 3}}
    few = DATASETS["image_folder"](folder, "train", max_samples=3)
    assert [int(few[i]["classification"]) for i in range(3)] == [0, 1, 2]


def test_a_folder_without_splits_holds_out_a_fixed_fifth(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 10)
    names = {split: [s["name"] for s in DATASETS["image_folder"](tmp_path, split)] for split in ("train", "val")}
    assert len(names["val"]) == 4 and len(names["train"]) == 16
    assert not set(names["val"]) & set(names["train"])
    assert names["val"] == [s["name"] for s in DATASETS["image_folder"](tmp_path, "val")]


@pytest.mark.parametrize(
    ("break_it", "split", "error", "message"),
    [
        (lambda root: None, "test", FileNotFoundError, "has no folder test; it has train, val"),
        (lambda root: write_images(root / "val" / "dog", 1), "val", ValueError, "dog is a folder, but no class"),
        (lambda root: write_images(root / "extra", 1), "extra", ValueError, "holds no image"),
    ],
)
def test_faulty_folders_are_named(folder, break_it, split, error, message):
    break_it(folder)
    with pytest.raises(error, match=message):
        DATASETS["image_folder"](folder, split)


def test_what_tools_leave_behind_is_no_image_and_no_class(folder):
    before = len(DATASETS["image_folder"](folder, "val"))
    (folder / "val" / ".ipynb_checkpoints").mkdir()
    (folder / "val" / "ant" / "._000.png").write_bytes(b"a resource fork")
    assert len(DATASETS["image_folder"](folder, "val")) == before


def test_damaged_image_is_named(folder):
    (folder / "train" / "ant" / "000.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"ant/000\.png"):
        DATASETS["image_folder"](folder, "train")[0]


@pytest.mark.parametrize("name", LABELLED)
def test_contract_of_every_labelled_data_set(name, tmp_path):
    kind = LABELLED[name]
    assert kind.known_tasks == ("classification",) and kind.recipes["none"] is IMAGE_RECIPES["none"]
    assert "classification" in kind.task_kwargs or hasattr(kind, "read_task_kwargs")
    if name != "digits":  # they come with scikit-learn
        with pytest.raises(FileNotFoundError, match="no such folder"):
            kind(tmp_path / "absent", "train")
    if issubclass(kind, TorchvisionImages) or name == "cub200":
        with pytest.raises(FileNotFoundError, match="does not hold the data"):
            kind(tmp_path, "train")
        with pytest.raises(ValueError, match="has the splits train, val, test"):
            kind(tmp_path, "trian")


def test_cifar_holds_out_a_tenth_of_train_and_leaves_test_alone(tmp_path, monkeypatch):
    calls = []

    class FakeCIFAR:
        classes = ("x", "y")

        def __init__(self, root, download, train):
            calls.append((download, train))

        def __len__(self):
            return 50

        def __getitem__(self, index):
            return Image.new("RGB", (8, 8), (index, 0, 0)), index % 2

    monkeypatch.setattr(LABELLED["cifar10"], "reader", FakeCIFAR)
    sets = {split: LABELLED["cifar10"](tmp_path, split) for split in ("train", "val", "test")}
    assert calls == [(False, True), (False, True), (False, False)]
    reds = {split: {int(s["image"][0, 0, 0]) for s in images} for split, images in sets.items()}
    assert len(reds["val"]) == 5 and reds["train"] | reds["val"] == set(range(50)) == reds["test"]
    assert not reds["train"] & reds["val"]


def write_cub(root: Path, lists: dict[str, str] | None = None) -> Path:
    """Three species of twenty birds, every fourth in the test split."""
    names = [f"{1 + i // 20:03d}.Bird_{'abc'[i // 20]}/{i:02d}.png" for i in range(60)]
    for folder in {name.partition("/")[0] for name in names}:
        (root / "images" / folder).mkdir(parents=True)
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / "images" / name)
    written = {
        "images.txt": "".join(f"{i + 1} {name}\n" for i, name in enumerate(names)),
        "image_class_labels.txt": "".join(f"{i + 1} {1 + i // 20}\n" for i in range(60)),
        "train_test_split.txt": "".join(f"{i + 1} {int(i % 4 > 0)}\n" for i in range(60)),
        "classes.txt": "1 001.Bird_a\n2 002.Bird_b\n3 003.Bird_c\n",
    }
    for name, text in {**written, **(lists or {})}.items():
        (root / name).write_text(text)
    return root


def test_cub_has_its_official_split_and_a_tenth_of_train_as_val(tmp_path):
    write_cub(tmp_path / "CUB_200_2011")
    sets = {split: LABELLED["cub200"](tmp_path, split) for split in ("train", "val", "test")}
    assert sets["train"].class_names == {"classification": ("Bird_a", "Bird_b", "Bird_c")}
    reds = {split: {int(s["image"][0, 0, 0]): int(s["classification"]) for s in of} for split, of in sets.items()}
    assert set(reds["test"]) == set(range(0, 60, 4)) and len(reds["val"]) == 4  # of 45
    assert set(reds["train"]) | set(reds["val"]) == set(range(60)) - set(reds["test"])
    assert not set(reds["train"]) & set(reds["val"])
    assert all(label == red // 20 for found in reds.values() for red, label in found.items())


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"images.txt": "1 ../secret.png\n"}, "leaves the folder"),
        ({"image_class_labels.txt": "1 9\n"}, "image 1 .* has no class"),
        ({"train_test_split.txt": "1\n"}, r"train_test_split.txt: every line holds"),
    ],
)
def test_faulty_lists_of_cub_are_named(tmp_path, lists, message):
    write_cub(tmp_path, lists)
    with pytest.raises(ValueError, match=message):
        LABELLED["cub200"](tmp_path, "train")


def test_rand_augment_is_timms_and_leaves_other_random_numbers_alone(folder):
    assert isinstance(RandAugment().transform, timm.data.auto_augment.RandAugment)
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(0)
    first = [RandAugment()(image) for _ in range(8)]
    assert (random.random(), np.random.rand()) == expected
    torch.manual_seed(0)
    assert all(torch.equal(a, RandAugment()(image)) for a in first)
    assert first[0].dtype == torch.uint8 and sum(not torch.equal(a, image) for a in first) >= 3


@pytest.mark.parametrize("recipe", IMAGE_RECIPES)
@pytest.mark.parametrize("size", [(40, 30), (30, 40), (16, 16)])
def test_recipes_give_the_size_and_repeat_with_the_seed(recipe, size, folder):
    transform = build_transform(recipe, size, train=True, recipes=IMAGE_RECIPES)
    train = DATASETS["image_folder"](folder, "train", transform=transform)
    torch.manual_seed(1)
    first = train[7]["image"]
    torch.manual_seed(1)
    assert first.shape == (3, *size) and first.dtype == torch.float32 and torch.equal(first, train[7]["image"])


def test_validation_sees_the_middle_of_the_picture(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "train" / "a" / "0.png")
    transform = build_transform("crop", (10, 10), train=False, recipes=IMAGE_RECIPES, mean=(0, 0, 0), std=(1, 1, 1))
    assert DATASETS["image_folder"](tmp_path, "train", transform=transform)[0]["image"].min() == 1


def test_helpers():
    assert spread(range(10), 3) == [0, 3, 6] and spread(range(2), 3) == range(2)
    assert sorted(held_out(30, 0.1, "train") + held_out(30, 0.1, "val")) == list(range(30))


@pytest.mark.skipif(not REAL.is_dir(), reason="the CIFAR-10 sample is not there")
def test_real_sample():
    train, val = (DATASETS["image_folder"](REAL, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (2000, 600) and len(train.class_names["classification"]) == 10
    assert train[0]["image"].shape == (3, 32, 32)
