"""One frame of NYU Depth v2: classes, depth, normals from depth, edges from labels, and how they are written.

A module of its own so that worker processes can import it. Shapes: H, W image; N frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Colour camera of the Kinect, from camera_params.m of the data set's toolbox: fx, fy, cx, cy at 480x640. The labelled
# depth maps are already projected into this camera. The toolbox counts pixels from 1, hence the shift of the centre.
KINECT = (518.857901, 519.469611, 325.582449 - 1, 253.736166 - 1)
RADIUS, STEP = 10, 2  # a plane is fitted to every second pixel of 21x21
MAX_JUMP = 0.05  # neighbours whose inverse depth differs by more than this share belong to another surface
MIN_SHARE = 0.2  # of the neighbours must lie on the surface
VOID_GAP = 12  # unlabelled gaps up to this many pixels (at 480 rows) are closed before edges are looked for


@dataclass(frozen=True)
class Source:
    """What every frame is made from."""

    mat: str
    """``nyu_depth_v2_labeled.mat``."""
    class_table: bytes | None
    """Entry ``v`` is the class (0 to 40) of raw label ``v``; None where the 40 classes come from elsewhere."""
    depth: str
    """``inpainted`` or ``raw``."""


@dataclass(frozen=True)
class Frame:
    """One frame to make."""

    index: int
    """From 0, as in the arrays; files are named after the official number, from 1."""
    classes_HW: np.ndarray | None = None
    """The 40 classes where ``Source.class_table`` is None."""

    @property
    def name(self) -> str:
        return f"{self.index + 1:04d}"


@lru_cache(maxsize=1)
def open_mat(path: str) -> Any:
    import h5py

    return h5py.File(path, "r")


def convert(root: str, source: Source, frame: Frame) -> str:
    """Write all files of a frame below ``root``; returns its name.

    Raises:
        ValueError: unreadable data or a label without a class; names the frame.
    """
    mat, i = open_mat(source.mat), frame.index
    try:
        # MATLAB's arrays are column-major: HDF5 shows H x W x 3 x N as [N, 3, W, H].
        image_HW3 = mat["images"][i].transpose(2, 1, 0)
        labels_HW = mat["labels"][i].T.astype(np.int64)
        depth_HW = mat["depths"][i].T.astype(np.float32)
        raw_HW = mat["rawDepths"][i].T.astype(np.float32) if "rawDepths" in mat else depth_HW
        instances_HW = mat["instances"][i].T.astype(np.int64) if "instances" in mat else 0
    except OSError as error:
        raise ValueError(f"{source.mat}: cannot read frame {frame.name}: {error}") from error
    depth_HW = raw_HW if source.depth == "raw" else depth_HW
    classes_HW = frame.classes_HW
    if source.class_table is not None:
        classes_HW = to_classes(labels_HW, np.frombuffer(source.class_table, np.uint8), frame.name)
    assert classes_HW is not None
    # Painted-in depth is smooth, not true: no normals there.
    normals_HW3 = normals_from_depth(np.where(raw_HW > 0, depth_HW, 0))
    edge_HW = edges_from_regions(np.where(labels_HW > 0, labels_HW * 256 + instances_HW, 0))
    folder = Path(root)
    Image.fromarray(np.ascontiguousarray(image_HW3)).save(folder / "images" / f"{frame.name}.jpg", quality=95)
    Image.fromarray(np.ascontiguousarray(classes_HW)).save(folder / "segmentation" / f"{frame.name}.png")
    for task, array in (("depth", depth_HW), ("normals", normals_HW3), ("edge", edge_HW)):
        np.save(folder / task / f"{frame.name}.npy", np.ascontiguousarray(array))
    return frame.name


def to_classes(labels_HW: np.ndarray, table: np.ndarray, name: str) -> np.ndarray:
    """Raw labels (0 to 894) as uint8 classes (0 void, 1 to 40)."""
    highest = int(labels_HW.max())
    if highest >= len(table):
        raise ValueError(f"frame {name}: label {highest} has no class, the mapping knows 1 to {len(table) - 1}")
    return table[labels_HW]


def normals_from_depth(depth_HW: np.ndarray) -> np.ndarray:
    """Unit normals towards the camera, float32 ``[H, W, 3]``, x right, y down, z forward; zero where none was found.

    A plane has inverse depth ``1 / Z = A x + B y + C`` in normalised image coordinates, with (A, B, C) along its
    normal. So a linear least-squares fit to inverse depth in a window is exact for planes, and it weighs right: the
    Kinect measures disparity, whose error is the same near and far. Neighbours across a jump in depth are left out.
    ``depth_HW`` is in metres, 0 where not measured.
    """
    height, width = depth_HW.shape
    fx, fy, cx, cy = np.array(KINECT) * np.array([width / 640, height / 480] * 2)
    valid = np.isfinite(depth_HW) & (depth_HW > 0)
    q = np.where(valid, 1 / np.where(valid, depth_HW, 1), np.inf).astype(np.float32)
    du, dv, level = _plane_fit(q, valid)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    a, b = du * fx, dv * fy
    c = level - a * (x - cx) / fx - b * (y - cy) / fy
    normals = -np.stack([a, b, c], axis=-1)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    good = np.isfinite(length) & (length > 0)
    return np.where(good, normals / np.where(good, length, 1), 0).astype(np.float32)


def _plane_fit(q: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope along u and v, per pixel, and value at the centre, of the plane through ``q`` per window; NaN if none."""
    height, width = q.shape
    padded = np.pad(q, RADIUS, constant_values=np.inf)
    centre = np.where(valid, q, 0)
    limit = np.where(valid, MAX_JUMP * q, -1)
    shifts = range(-RADIUS, RADIUS + 1, STEP)
    # Sums over the window of: 1, u, v, uu, uv, vv, r, ur, vr, with r = q - q at the centre.
    sums = np.zeros((9, height, width), np.float32)
    for v in shifts:
        for u in shifts:
            rise = padded[RADIUS + v : RADIUS + v + height, RADIUS + u : RADIUS + u + width] - centre
            near = np.abs(rise) <= limit
            weight, rise = near.astype(np.float32), np.where(near, rise, 0)
            for k, factor in enumerate((1, u, v, u * u, u * v, v * v)):
                if factor:
                    sums[k] += factor * weight
            for k, factor in enumerate((1, u, v), start=6):
                if factor:
                    sums[k] += factor * rise
    count = sums[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        mu, mv, muu, muv, mvv, mr, mur, mvr = sums[1:] / count
        cuu, cuv, cvv = muu - mu * mu, muv - mu * mv, mvv - mv * mv
        cur, cvr = mur - mu * mr, mvr - mv * mr
        det = cuu * cvv - cuv * cuv
        du, dv = (cvv * cur - cuv * cvr) / det, (cuu * cvr - cuv * cur) / det
    # Neighbours along one line only leave the plane open.
    found = valid & (count >= MIN_SHARE * len(shifts) ** 2) & (det > 1)
    du, dv = np.where(found, du, np.nan), np.where(found, dv, np.nan)
    return du, dv, centre + mr - du * mu - dv * mv


def edges_from_regions(regions_HW: np.ndarray) -> np.ndarray:
    """Borders between regions, uint8 ``[H, W]``, thinned to one pixel; 0 in ``regions_HW`` is unlabelled.

    People label objects with narrow gaps between them; each would give two edges, so gaps are closed first.
    """
    from scipy.ndimage import distance_transform_edt
    from skimage.morphology import thin

    void = regions_HW == 0
    if void.any() and not void.all():
        distance, nearest = distance_transform_edt(void, return_indices=True)
        close = distance <= max(1, VOID_GAP * regions_HW.shape[0] / 480)
        regions_HW = np.where(void & close, regions_HW[tuple(nearest)], regions_HW)
    border = np.zeros(regions_HW.shape, bool)
    border[:, :-1] |= regions_HW[:, :-1] != regions_HW[:, 1:]
    border[:-1] |= regions_HW[:-1] != regions_HW[1:]
    return thin(border).astype(np.uint8)
