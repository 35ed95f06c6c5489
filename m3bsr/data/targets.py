"""From raw label values to targets: what is a hole becomes ``IGNORE``, what is out of range is an error with the file.

Every function gives a tensor ``[C, H, W]`` of the label type whose geometry the transforms know.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m3bsr.data.files import MAX_PIXELS, read_array, read_grey, read_image, read_labels
from m3bsr.data.transforms import Depth, Edge, Labels, Normals
from m3bsr.utils.constants import IGNORE
from m3bsr.utils.log import get_logger

log = get_logger(__name__)
_said_nan: set[Path] = set()

MAX_DEPTH = 100.0
"""Metres; more is another unit (millimetres), and would come near ``IGNORE`` in a zoom."""


def class_table(num_classes: int, first: int = 0, void: Sequence[int] = (IGNORE,)) -> np.ndarray:
    """For :func:`m3bsr.data.files.read_labels`: raw ``first, first + 1, ...`` are the classes, ``void`` is ``IGNORE``,
    everything else out of range."""
    table = np.full(256, -1, np.int16)
    table[first : first + num_classes] = np.arange(min(num_classes, 256 - first))
    table[list(void)] = IGNORE
    return table


def read_classes(path: Path, table: np.ndarray) -> Labels:
    """Classes of a label picture, through a :func:`class_table`."""
    return Labels(read_labels(path, table))


def depth_target(raw: Tensor, path: Path, longest: float = MAX_DEPTH, unit: str = "metres") -> Depth:
    """Depth ``[1, H, W]``; 0, negative, NaN and infinite are holes, and so is 255. NaN is said, once a folder.

    Raises:
        ValueError: more than ``longest``, or nothing but NaN.
    """
    num_nan = int(raw.isnan().sum())
    if num_nan == raw.numel():
        raise ValueError(f"{path}: every depth is NaN; {unit} are expected, 0 where nothing is known")
    if num_nan and path.parent not in _said_nan:
        _said_nan.add(path.parent)
        log.warning("%s: %d of %d depths are NaN, taken as holes (said once a folder)", path, num_nan, raw.numel())
    valid = torch.isfinite(raw) & (raw > 0) & (raw != IGNORE)
    depth = torch.where(valid, raw, float(IGNORE))
    wrong = valid & (depth > longest)
    if wrong.any():
        raise ValueError(f"{path}: depth {raw[wrong][0]:g} is out of range, {unit} up to {longest:g} are expected")
    return Depth(depth)


def normals_target(raw: Tensor, path: Path) -> Normals:
    """Unit vectors ``[3, H, W]``, renormalised; zero vectors, NaN and (255, 255, 255) are holes.

    Raises:
        ValueError: a vector twice as long as it should be, or all of them between 0 and 1: ``(n + 1) / 2``, a colour.
    """
    # Not raw.norm(dim=0), which takes thirty times as long over three channels.
    length = raw.square().sum(dim=0, keepdim=True).sqrt()
    valid = torch.isfinite(length) & (length > 0.1) & ~(raw == IGNORE).all(dim=0, keepdim=True)
    wrong = valid & (length > 2)
    if wrong.any():
        raise ValueError(f"{path}: a normal of length {length[wrong][0]:g}, unit vectors are expected")
    if not (raw < 0).any() and (valid & ((length - 1).abs() > 0.05)).sum() > 0.5 * valid.sum():
        raise ValueError(f"{path}: no component is negative, and lengths are not 1: n is expected, not (n + 1) / 2")
    return Normals(torch.where(valid, raw / length, float(IGNORE)))


def read_normals_picture(path: Path) -> Normals:
    """Unit vectors from a colour picture of ``(n + 1) / 2 * 255``; black, white and middle grey are holes.

    Raises:
        ValueError: most vectors are nowhere near unit length: not such a picture.
    """
    picture = read_image(path)
    raw = 2 * picture.float() / 255 - 1
    length = raw.norm(dim=0, keepdim=True)
    # Neither black nor white is a unit vector; a zero vector was rounded to 127 or 128.
    hole = (picture == 0).all(0, keepdim=True) | (picture == 255).all(0, keepdim=True) | (length < 0.1)
    far = ~hole & ((length < 0.5) | (length > 1.5))
    if far.sum() > 0.5 * (~hole).sum():
        raise ValueError(f"{path}: 2 v / 255 - 1 gives no unit vectors (median length {length[~hole].median():.2f})")
    return normals_target(torch.where(hole, 0.0, raw), path)


def edge_target(raw: Tensor) -> Edge:
    """Above 0 is an edge, NaN a hole; 255 is a hole too, but in a file without any other value it is the edge."""
    hole = raw == IGNORE
    if hole.any() and not ((raw > 0) & ~hole).any():
        hole = torch.zeros_like(hole)
    return Edge(torch.where(hole | raw.isnan(), float(IGNORE), (raw > 0).float()))


def read_mask(path: Path) -> Edge:
    """Yes (1) or no (0) per pixel from a grey picture: more than half of white is yes.

    In a picture without values between 1 and 255 that has a 1, 1 is yes and 255 a hole: a mask written as 0 and 1.
    """
    raw = read_grey(path)
    if (raw == 1).any() and ((raw <= 1) | (raw == IGNORE)).all():
        return Edge(torch.where(raw == IGNORE, float(IGNORE), raw.float()))
    return Edge((raw > 127).float())


def read_depth(path: Path) -> Depth:
    """Metres from a ``.npy`` file."""
    return depth_target(read_array(path, 1), path)


def read_normals(path: Path) -> Normals:
    """Unit vectors from a ``.npy`` file."""
    return normals_target(read_array(path, 3), path)


def read_edge(path: Path) -> Edge:
    """Edges from a ``.npy`` file."""
    return edge_target(read_array(path, 1))


def read_matlab(path: Path, name: str) -> np.ndarray:
    """The variable ``name`` of a MATLAB file (version 7 or older).

    Raises:
        FileNotFoundError, ValueError: missing, damaged, or without that variable.
    """
    from scipy.io import loadmat, whosmat  # slow to import, and only this format needs it

    if not path.is_file():
        raise FileNotFoundError(f"missing file: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown classes and truncated headers; what is wrong is found below
            shapes = {key: shape for key, shape, _ in whosmat(path)}  # of compressed variables the headers only
            if math.prod(shapes.get(name, ())) > MAX_PIXELS:
                raise ValueError(f"{name} of shape {shapes[name]} is more than the {MAX_PIXELS:,} values allowed")
            content = loadmat(path, variable_names=[name])
    except Exception as error:  # a damaged file fails in many ways: zlib, struct, MatReadError, MemoryError
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content.get(name), np.ndarray):
        raise ValueError(f"{path} holds no variable {name}")
    return content[name]


def blank(task: str, size: Sequence[int]) -> Tensor:
    """``IGNORE`` everywhere, ``[C, H, W]``: the target of a sample without labels for the task."""
    if task in ("semseg", "human_parts"):
        return Labels(torch.full((1, *size), IGNORE, dtype=torch.uint8))
    nothing = torch.full((3 if task == "normals" else 1, *size), float(IGNORE))
    if task == "normals":
        return Normals(nothing)
    return Depth(nothing) if task == "depth" else Edge(nothing)
