"""Reading images and label files safely: every failure names the file, nothing is ever unpickled."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m3bsr.utils.foreign import one_line

# A photograph has tens of megapixels; more is a mistake or an attack, and would not fit in memory.
MAX_PIXELS = 100_000_000
# What is decoded, whatever a file is called: Pillow knows many more formats, among them EPS, which starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
# Pillow's modes of grey pictures in more than 8 bits.
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")


def dataset_path(root: str | Path) -> Path:
    """Where data lies: ``$M3BSR_DATASETS`` takes the place of ``datasets/``, for reading and for writing.

    Relative paths are relative to it; absolute paths and those that start with ``..`` mean what they say.
    """
    path, moved = Path(root).expanduser(), os.environ.get("M3BSR_DATASETS")
    if not moved or path.is_absolute() or path.parts[:1] == ("..",):
        return path
    return Path(moved, *(path.parts[1:] if path.parts[:1] == ("datasets",) else path.parts))


def resolve_root(root: str | Path) -> Path:
    """:func:`dataset_path` of a folder that must exist.

    Raises:
        FileNotFoundError: no such folder.
    """
    path = dataset_path(root)
    if not path.is_dir():
        moved = path != Path(root).expanduser()
        hint = f" (from {root} by M3BSR_DATASETS={os.environ['M3BSR_DATASETS']})" if moved else ""
        raise FileNotFoundError(f"data.root: no such folder: {path}{hint}; see datasets/*/README.md for how to get it")
    return path


def read_image(path: Path) -> Tensor:
    """An RGB image as uint8 ``[3, H, W]``.

    Raises:
        FileNotFoundError, ValueError: missing, no image, truncated, larger than ``MAX_PIXELS``, or grey in 16 bits.
    """
    return torch.from_numpy(_pixels(path, "RGB")).permute(2, 0, 1)


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, read from its header alone.

    Raises:
        FileNotFoundError, ValueError: missing, or no image.
    """
    if not path.is_file():
        raise FileNotFoundError(f"missing file: {path}")
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.height, image.width
    except Exception as error:  # a damaged file fails in many ways: OSError, SyntaxError, struct.error
        raise ValueError(f"cannot read image {path}: {one_line(error)}") from None


def read_labels(path: Path, table: np.ndarray, dtype: type[np.generic] = np.uint8) -> Tensor:
    """A label image (palette or grey, 1, 8 or 16 bit) as ``dtype`` ``[1, H, W]``, each value ``v`` made ``table[v]``.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_image`, and a value beyond the table or where it holds -1.
    """
    raw = _pixels(path, None)
    if raw.dtype.kind not in "bui":
        raise ValueError(f"{path}: labels must be whole numbers, found {raw.dtype}")
    raw = raw.astype(np.uint8) if raw.dtype.kind == "b" else raw  # as an index, bool would select instead of look up
    highest, lowest = int(raw.max()), int(raw.min())
    if highest >= len(table) or lowest < 0:
        raise ValueError(f"{path}: label {highest if lowest >= 0 else lowest} is out of range")
    labels = table[raw]
    if labels.min() < 0:
        wrong = int(raw[labels < 0][0])
        known = _ranges(np.flatnonzero(table >= 0))
        raise ValueError(f"{path}: label {wrong} is out of range; known: {known}")
    return torch.from_numpy(labels.astype(dtype))[None]


def read_grey(path: Path) -> Tensor:
    """A picture as uint8 ``[1, H, W]``: grey values, palette indices as they are, 1 bit as 0 and 255, colour made grey.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_image`, and a picture of more than 8 bits.
    """
    raw = _pixels(path, None, grey=True)
    if raw.dtype != np.uint8:
        raise ValueError(f"{path}: a picture of 8 bits is expected, found {raw.dtype}")
    return torch.from_numpy(raw)[None]


def _ranges(values: np.ndarray) -> str:
    """``0-40, 255`` for the numbers 0 to 40 and 255."""
    groups = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)


def _pixels(path: Path, mode: str | None, grey: bool = False) -> np.ndarray:
    """``mode``: Pillow's, or None for the values on file; ``grey``: these, but of one channel."""
    if not path.is_file():
        raise FileNotFoundError(f"missing file: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs and odd metadata; what matters is checked here
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
                if mode == "RGB" and image.mode in DEEP:  # Pillow would cut them off at 255: a white picture
                    raise ValueError("a picture of 8 bits is expected; scale its grey values to 0-255 first")
                if grey and image.mode not in ("L", "P", *DEEP):
                    mode = "L"
                array = np.array(image.convert(mode) if mode else image)
    except Exception as error:  # a damaged file fails in many ways: OSError, SyntaxError, struct.error
        raise ValueError(f"cannot read image {path}: {one_line(error)}") from None
    if mode is None and array.ndim != 2:
        raise ValueError(f"{path}: labels must have one channel, found shape {array.shape}")
    return array


def read_array(path: Path, channels: int) -> Tensor:
    """A ``.npy`` array ``[H, W]`` or ``[H, W, C]`` as float32 ``[C, H, W]``.

    Raises:
        FileNotFoundError, ValueError: missing, damaged, pickled, or with another number of channels.
    """
    if not path.is_file():
        raise FileNotFoundError(f"missing file: {path}")
    try:
        # Mapped, because that compares the shape in the header with the size of the file before any memory is taken.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header fails in many ways
        raise ValueError(f"cannot read array {path}: {one_line(error)}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path}: expected one array, found an archive")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: expected numbers, found values of type {array.dtype}")
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[-1] != channels:
        raise ValueError(f"{path}: expected [H, W] with {channels} channel(s), found shape {array.shape}")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ValueError(f"{path}: {array.shape[1]} x {array.shape[0]} pixels are more than the {MAX_PIXELS:,} allowed")
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), dtype=np.float32, order="C"))


def read_names(path: Path) -> list[str]:
    """The names in a split file, one a line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, a name twice, or a name that leaves its folder.
    """
    if not path.is_file():
        found = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"missing split file: {path} (splits there: {found})")
    lines = read_text(path).splitlines()
    names: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name:
            continue
        if name in names:
            raise ValueError(f"{path}, line {number}: {name!r} stands in line {names[name]} already")
        if "/" in name or "\\" in name or "\0" in name or name.startswith("."):
            raise ValueError(f"{path}, line {number}: {name!r} is no plain file name")
        names[name] = number
    if not names:
        raise ValueError(f"{path} names no samples")
    return list(names)


def read_text(path: Path) -> str:
    """A text file in UTF-8, with a byte order mark or without. ValueError, with the file, for anything else."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: {error}") from None


def check_files(names: Sequence[str], folder: Path, suffix: str, split_file: Path) -> None:
    """That ``folder`` holds ``name + suffix`` for every name: one directory listing, however many names.

    Raises:
        FileNotFoundError: names the first missing file and counts the rest.
    """
    there = set(os.listdir(folder))
    missing = [name for name in names if name + suffix not in there]
    if missing:
        others = sorted(file for file in there if file.rpartition(".")[0] == missing[0])
        raise FileNotFoundError(
            f"missing file: {folder / (missing[0] + suffix)}, listed in {split_file}"
            + (f", and {len(missing) - 1} more of {len(names)}" if len(missing) > 1 else "")
            + (f" (there is {others[0]}: another packaging?)" if others else "")
        )
