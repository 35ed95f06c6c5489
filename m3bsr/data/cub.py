"""CUB-200-2011 from its own lists: the official split, with a tenth of its training images as val."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor

from m3bsr.data.files import read_image, read_text, resolve_root
from m3bsr.data.labelled import Indices, LabelledImages, held_out

# Share of the training images that are held out as val: the benchmark has train and test only.
VAL_SHARE = 0.1
SPLITS = ("train", "val", "test")


class CUB200(LabelledImages):
    """Caltech-UCSD Birds, 200 species: 5,395 train, 599 val, 5,794 test images.

    ``root`` is the unpacked ``CUB_200_2011`` (``images/``, ``images.txt``, ``image_class_labels.txt``,
    ``train_test_split.txt``, ``classes.txt``), or the folder that holds it.
    """

    task_kwargs: ClassVar = {"classification": {"num_classes": 200}}

    def open(self, root: str | Path, split: str) -> Indices:
        if split not in SPLITS:
            raise ValueError(f"CUB200 has the splits {', '.join(SPLITS)}; got {split!r}")
        root = resolve_root(root)
        self.root = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
        paths, classes, in_train = (
            self._list(name) for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
        )
        names = self._list("classes.txt")
        self.names_of_classes = tuple(name.partition(".")[2] or name for name in names.values())
        numbers = {number: label for label, number in enumerate(names)}
        wanted = "0" if split == "test" else "1"
        self.files: list[tuple[str, int]] = []
        for number, path in paths.items():
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise ValueError(f"{self.root / 'images.txt'}: {path!r} leaves the folder of the images")
            if classes.get(number) not in numbers or in_train.get(number) not in ("0", "1"):
                raise ValueError(f"{self.root}: image {number} ({path}) has no class or no split in the lists")
            if in_train[number] == wanted:
                self.files.append((path, numbers[classes[number]]))
        if split == "test":
            return range(len(self.files))
        return held_out(len(self.files), VAL_SHARE, split)

    def _list(self, name: str) -> dict[str, str]:
        """A list of the benchmark: number and value in every line."""
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(
                f"CUB200: {self.root} does not hold the data (no {name}); see datasets/classification/README.md"
            )
        pairs = (line.split(maxsplit=1) for line in read_text(path).splitlines() if line.strip())
        rows = list(pairs)
        if any(len(pair) != 2 for pair in rows):
            raise ValueError(f"{path}: every line holds a number and a value, as in 1 001.Black_footed_Albatross")
        return {number: value.strip() for number, value in rows}

    def read(self, index: int) -> tuple[Tensor, int, str]:
        path, label = self.files[index]
        return read_image(self.root / "images" / path), label, path
