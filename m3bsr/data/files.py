"""Reading images and label files safely: every failure names the file, nothing is ever unpickled."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

# A photograph has tens of megapixels; more is a mistake or an attack, and would not fit in memory.
MAX_PIXELS = 100_000_000


def resolve_root(root: str | Path) -> Path:
    """Where data lies: ``$M3BSR_DATASETS`` takes the place of a leading ``datasets/`` of relative paths.

    Raises:
        FileNotFoundError: no such folder.
    """
    path, moved = Path(root), os.environ.get("M3BSR_DATASETS")
    if moved and not path.is_absolute():
        path = Path(moved, *(path.parts[1:] if path.parts[:1] == ("datasets",) else path.parts))
    if not path.is_dir():
        hint = f" (M3BSR_DATASETS is {moved})" if moved else ""
        raise FileNotFoundError(f"data.root: no such folder: {path}{hint}; see datasets/*/README.md for how to get it")
    return path


def read_image(path: Path) -> Tensor:
    """An RGB image as uint8 ``[3, H, W]``.

    Raises:
        FileNotFoundError, ValueError: missing, no image, truncated, or larger than ``MAX_PIXELS``.
    """
    return torch.from_numpy(_pixels(path, "RGB")).permute(2, 0, 1)


def read_labels(path: Path) -> Tensor:
    """A label image (palette or grey, 8 or 16 bit) as int64 ``[1, H, W]``; see :func:`read_image` for errors."""
    return torch.from_numpy(_pixels(path, None).astype(np.int64))[None]


def _pixels(path: Path, mode: str | None) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"missing file: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
                array = np.array(image.convert(mode) if mode else image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read image {path}: {error}") from error
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
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"cannot read array {path}: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: expected one array, found an archive")
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[-1] != channels:
        raise ValueError(f"{path}: expected [H, W] with {channels} channels, found shape {array.shape}")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))


def read_names(path: Path) -> list[str]:
    """The names in a split file, one a line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, a name twice, or a name that leaves its folder.
    """
    if not path.is_file():
        found = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
        raise FileNotFoundError(f"missing split file: {path} (splits there: {found})")
    try:
        names = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: {error}") from error
    if not names:
        raise ValueError(f"{path} names no samples")
    seen: set[str] = set()
    for line, name in enumerate(names, start=1):
        if name in seen:
            raise ValueError(f"{path}, entry {line}: {name!r} stands there twice")
        if "/" in name or "\\" in name or name.startswith("."):
            raise ValueError(f"{path}, entry {line}: {name!r} is no plain file name")
        seen.add(name)
    return names
