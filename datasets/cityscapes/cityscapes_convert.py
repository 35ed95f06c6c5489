"""One frame of Cityscapes, made small: picture, seven classes, inverse depth.

A module of its own so that worker processes can import it. Shapes: H, W on file; h, w of the arrays.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from m3bsr.data.files import read_image, read_labels
from m3bsr.utils.constants import IGNORE
from m3bsr.utils.foreign import read_object

# Official label ids 0 to 33 by category: flat, construction, object, nature, sky, human, vehicle. Those that the
# benchmark does not score are void: 0 to 6, and parking, rail track, guard rail, bridge, tunnel, pole group, caravan,
# trailer.
CATEGORIES = ((7, 8), (11, 12, 13), (17, 19, 20), (21, 22), (23,), (24, 25), (26, 27, 28, 31, 32, 33))
CLASS_TABLE = np.full(34, IGNORE)
for _number, _ids in enumerate(CATEGORIES):
    CLASS_TABLE[list(_ids)] = _number
DISPARITIES = np.arange(1 << 16)
FOLDERS = {"semseg": "label_7", "depth": "depth"}


@dataclass(frozen=True)
class Frame:
    """One frame to make: its number, and the files that it is made from."""

    split: str
    index: int
    image: Path
    labels: Path | None
    disparity: Path | None
    camera: Path | None

    @property
    def name(self) -> str:
        return self.image.name.removesuffix("_leftImg8bit.png")

    def files(self, root: Path) -> dict[str, Path]:
        """Folder and file of each array."""
        folders = {"image": self.image, "label_7": self.labels, "depth": self.disparity}
        return {key: root / self.split / key / f"{self.index}.npy" for key, path in folders.items() if path}


def frames_of(official: Path, split: str, tasks: tuple[str, ...]) -> list[Frame]:
    """The frames of a split, by city, sequence and number.

    Raises:
        FileNotFoundError: a folder or a file is missing; names the first and counts the others.
    """
    folder = official / "leftImg8bit" / split
    images = sorted(folder.glob("*/*_leftImg8bit.png"))
    if not images:
        raise FileNotFoundError(f"no pictures like {folder / 'CITY' / 'NAME_leftImg8bit.png'}")

    def beside(image: Path, task: str, package: str, ending: str) -> Path | None:
        name = image.name.replace("_leftImg8bit.png", ending)
        return official / package / split / image.parent.name / name if task in tasks else None

    frames = [
        Frame(
            split,
            index,
            image,
            beside(image, "semseg", "gtFine", "_gtFine_labelIds.png"),
            beside(image, "depth", "disparity", "_disparity.png"),
            beside(image, "depth", "camera", "_camera.json"),
        )
        for index, image in enumerate(images)
    ]
    wanted = [path for frame in frames for path in (frame.labels, frame.disparity, frame.camera) if path]
    missing = [path for path in wanted if not path.is_file()]
    if missing:
        more = f", and {len(missing) - 1} more of {len(wanted)}" if len(missing) > 1 else ""
        raise FileNotFoundError(f"missing file: {missing[0]}{more}")
    return frames


def convert(root: Path, size: tuple[int, int], frame: Frame) -> None:
    """Write the arrays of a frame below ``root``; those that are there already were written whole, and stay.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or of another size than its picture.
    """
    files = frame.files(root)
    if all(path.is_file() for path in files.values()):
        return
    image = read_image(frame.image).permute(1, 2, 0).numpy()
    small = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BOX)
    arrays = {"image": np.asarray(small, np.float32) / 255}
    if frame.labels:
        labels = _nearest(read_labels(frame.labels, CLASS_TABLE)[0].numpy(), size, frame.labels, image.shape[:2])
        arrays["label_7"] = np.where(labels == IGNORE, -1, labels.astype(np.int16)).astype(np.int8)
    if frame.disparity and frame.camera:
        raw = read_labels(frame.disparity, DISPARITIES, np.int32)[0].numpy()
        raw = _nearest(raw, size, frame.disparity, image.shape[:2])
        arrays["depth"] = inverse_depth(raw, frame.camera)[..., None]
    for key, path in files.items():
        unfinished = path.with_suffix(".tmp")
        with open(unfinished, "wb") as file:
            np.save(file, arrays[key])
        os.replace(unfinished, path)


def inverse_depth(raw: np.ndarray, camera: Path) -> np.ndarray:
    """1/m from the 16-bit values of a disparity file: 0 is unknown, others are ``256 * disparity + 1`` in pixels.

    Depth is baseline times focal length over disparity (README of Cityscapes).

    Raises:
        FileNotFoundError, ValueError: no such camera file, or without these two numbers.
    """
    content = read_object(camera)
    try:
        baseline, focal = float(content["extrinsic"]["baseline"]), float(content["intrinsic"]["fx"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{camera} has no extrinsic.baseline and intrinsic.fx") from None
    if not (0 < baseline < np.inf and 0 < focal < np.inf):
        raise ValueError(f"{camera}: baseline and fx must be positive, got {baseline} and {focal}")
    return (np.maximum(raw - 1, 0) / 256 / (baseline * focal)).astype(np.float32)


def _nearest(values: np.ndarray, size: tuple[int, int], path: Path, image_size: tuple[int, int]) -> np.ndarray:
    """Every pixel of the small array takes the value in the middle of its area: nothing is mixed."""
    if values.shape != image_size:
        raise ValueError("{} is {}x{} pixels, its picture {}x{}".format(path, *values.shape, *image_size))
    rows, columns = (((np.arange(n) + 0.5) * full / n).astype(int) for n, full in zip(size, values.shape, strict=True))
    return values[rows[:, None], columns]
