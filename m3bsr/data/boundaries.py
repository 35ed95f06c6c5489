"""Boundaries drawn by one annotator or several: a folder of pictures, one folder for each annotator, or BSDS files.

``TRUTH/{name}.png|npy``; or ``TRUTH/{annotator}/{name}.png|npy``; or ``TRUTH/{name}.mat`` with ``groundTruth``, as the
Berkeley segmentation data sets have it (Martin et al. 2001; Arbelaez et al. 2011).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from m3bsr.data.targets import read_edge, read_mask, read_matlab

SUFFIXES = (".png", ".npy", ".mat")


def truth_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each image; with a folder for each annotator one of each, whether it is there or not.

    Raises:
        FileNotFoundError, ValueError: no such folder, or no annotation in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of annotations: {folder}")
    annotators = sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path)) or [folder]
    found = {
        annotator: {p.stem: p for p in annotator.iterdir() if p.suffix in SUFFIXES and not _is_hidden(p)}
        for annotator in annotators
    }
    names = sorted({name for files in found.values() for name in files})
    if not names:
        raise ValueError(f"{folder} holds no annotation ({', '.join(SUFFIXES)})")
    return {name: [found[a].get(name, a / f"{name}.png") for a in annotators] for name in names}


def _is_hidden(path: Path) -> bool:
    """What file managers and archives leave behind is no annotator."""
    return path.name.startswith((".", "__"))


def read_boundaries(paths: list[Path]) -> Tensor:
    """Annotations of an image ``[A, H, W]``: 0, 1, ``IGNORE``.

    Raises:
        FileNotFoundError, ValueError: an annotator is missing, a faulty file, annotations of several sizes.
    """
    drawn: list[Tensor] = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"missing annotator: {path}")
        found = _read_bsds(path) if path.suffix == ".mat" else [READERS[path.suffix](path).as_subclass(Tensor)[0]]
        drawn += found
        if drawn[-1].shape != drawn[0].shape:
            sizes = ["{}x{}".format(*x.shape) for x in (drawn[-1], drawn[0])]
            raise ValueError(f"{path} is {sizes[0]} pixels, another annotation of the image {sizes[1]}")
    return torch.stack(drawn)


READERS = {".png": read_mask, ".npy": read_edge}


def _read_bsds(path: Path) -> list[Tensor]:
    """``groundTruth{k}.Boundaries`` for each annotator k."""
    cells = read_matlab(path, "groundTruth").reshape(-1)
    try:
        drawn = [torch.from_numpy(cell["Boundaries"].item().astype("float32")) for cell in cells]
    except (ValueError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: groundTruth has no Boundaries for each annotator ({error})") from None
    if not drawn or any(boundaries.ndim != 2 for boundaries in drawn):
        raise ValueError(f"{path}: missing annotator: groundTruth is empty")
    return [(boundaries > 0).float() for boundaries in drawn]
